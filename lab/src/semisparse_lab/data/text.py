"""Text to learn from that every Python brings along: the source of its standard library."""

import hashlib
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
    parts: dict[str, list[bytes]] = {"train": [], "validation": [], "test": []}
    digest = hashlib.sha256()
    try:
        paths = sorted(
            path for path in root.rglob("*.py") if path.is_file() and not _LEFT_OUT & set(path.relative_to(root).parts)
        )
        for path in paths:
            name, content = path.relative_to(root).as_posix(), path.read_bytes() + b"\0"
            digest.update(name.encode() + b"\0" + content)
            twentieth = hashlib.sha256(name.encode()).digest()[0] % 20
            parts[{0: "validation", 1: "test"}.get(twentieth, "train")].append(content)
    except OSError as error:
        raise DataError(f"data_dir={str(root)!r} cannot be read: {error.strerror or error}") from error
    for part, contents in parts.items():
        if not contents:
            raise DataError(f"data_dir={str(root)!r} has {len(paths)} .py files, none of them for {part}; "
                            "pass the folder of a whole standard library")  # fmt: skip
    # A bytearray, because torch warns of memory that it may not write to.
    joined = {
        part: torch.frombuffer(bytearray(b"".join(contents)), dtype=torch.uint8) for part, contents in parts.items()
    }
    return Corpus(
        **{part: tensor.to(device) for part, tensor in joined.items()}, files=len(paths), sha256=digest.hexdigest()
    )
