"""Text to learn from that every Python brings along: the source of its standard library, or of its packages."""

import hashlib
import os
import sysconfig
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from semisparse_lab.errors import DataError

_LEFT_OUT = frozenset({"site-packages", "dist-packages", "test", "tests", "__pycache__", "idlelib", "turtledemo"})


@dataclass(frozen=True, slots=True)
class Corpus:
    """Bytes in three disjoint sets of whole files: uint8 tensors of one dimension, on one device.

    Attributes:
        train: Bytes to train on.
        validation: Bytes on which settings are chosen.
        test: Bytes that are read once, after training.
        files: Number of files in all sets.
        sha256: Checksum of the files' names and contents.
    """

    train: Tensor
    validation: Tensor
    test: Tensor
    files: int
    sha256: str

    def shortened(self, length: int) -> "Corpus":
        """The first length bytes of the training set, and a tenth as many of the others."""
        tenth = length // 10
        return replace(self, train=self.train[:length], validation=self.validation[:tenth], test=self.test[:tenth])


def standard_library(folder: Path | None = None, device: torch.device | str = "cpu") -> Corpus:
    """The .py files of the standard library of this interpreter, or of folder, without its tests.

    A file's name decides its set: one of 20 is for validation, one for test. Files are joined in the order of their
    names, each ended by a zero byte. Another Python version has other files; Corpus.sha256 tells.

    Args:
        folder: A standard library, None for this interpreter's.
        device: Where the bytes go.

    Raises:
        DataError: folder has no source, or so little that a set is empty.
    """
    root = Path(sysconfig.get_path("stdlib")) if folder is None else folder
    return _read(root, device, "the folder of a whole standard library")


def packages(folder: Path | None = None, device: torch.device | str = "cpu", *, most: int) -> Corpus:
    """The .py files of the packages installed beside torch, or of folder, without their tests and without copies.

    Sets are made as by standard_library. Of files with equal contents, links to another file for instance, only the
    first is read. Links to folders are not followed. Other versions of packages have other files; Corpus.sha256 tells.

    Args:
        folder: Any folder with Python source, None for the one that torch is installed in.
        device: Where the bytes go.
        most: The training set ends after this many bytes. No file is read after it has them and each of the others has
            a fiftieth of them.

    Raises:
        DataError: As standard_library.
    """
    root = Path(torch.__file__).parents[1] if folder is None else folder
    return _read(root, device, "a folder of installed packages", copies=False, most=most)


def _read(
    root: Path, device: torch.device | str, wanted: str, *, copies: bool = True, most: int | None = None
) -> Corpus:
    """The files below root. wanted: what a message asks for; copies: files with equal contents are all read."""
    parts = {"train": bytearray(), "validation": bytearray(), "test": bytearray()}
    digest, seen, files = hashlib.sha256(), set[bytes](), 0
    try:
        paths = sorted(
            path for path in root.rglob("*.py") if path.is_file() and not _LEFT_OUT & set(path.relative_to(root).parts)
        )
        for path in paths:
            if most is not None and all(len(text) >= most // (1 if p == "train" else 50) for p, text in parts.items()):
                break
            # A name is bytes for the system, and need not be text.
            name, content = os.fsencode(path.relative_to(root).as_posix()), path.read_bytes() + b"\0"
            checksum = hashlib.sha256(content).digest()
            if checksum in seen and not copies:
                continue
            seen.add(checksum)
            digest.update(name + b"\0" + content)
            twentieth = hashlib.sha256(name).digest()[0] % 20
            parts[{0: "validation", 1: "test"}.get(twentieth, "train")] += content
            files += 1
    except OSError as error:
        raise DataError(f"data_dir={str(root)!r} cannot be read: {error.strerror or error}") from error
    for part, text in parts.items():
        if not text:
            raise DataError(f"data_dir={str(root)!r} has {files} .py files, none of them for {part}; pass {wanted}")
    joined = {part: torch.frombuffer(text, dtype=torch.uint8) for part, text in parts.items()}
    joined["train"] = joined["train"][:most]
    return Corpus(
        **{part: tensor.to(device) for part, tensor in joined.items()}, files=files, sha256=digest.hexdigest()
    )
