"""Tokens of a text in three sets on the disk: made from a kernel's source in steps that resume, checked, loaded.

A folder holds train.npy, validation.npy and test.npy (uint16), tokenizer.json, the texts, and manifest.json, which says
where the text is from, and for each file its size and checksum. It also has the bytes of each token, so that bits per
byte are exact.
"""

import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from semisparse.documents import with_checksum
from semisparse.files import write_atomically
from semisparse_lab.checks import shown
from semisparse_lab.data.byte_pairs import encoded, token_lengths, trained_tokenizer
from semisparse_lab.data.linux import PARTS, OnProgress, fetched_archive, read_source, unpacked_package
from semisparse_lab.errors import DataError, OutputExistsError
from semisparse_lab.strict_json import read

SHARE = 0.45
"""Of the files that are not held out, how many are for training: what a bundle of 55 MiB holds."""
VOCABULARY = 8192
MANIFEST, TOKENIZER = "manifest.json", "tokenizer.json"
Manifest = dict[str, Any]
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class TokenSets:
    """Tokens in three disjoint sets of whole files: int16 tensors of one dimension, on one device.

    Attributes:
        train: Tokens to train on.
        validation: Tokens on which settings are chosen.
        test: Tokens that are read once, after training.
        lengths: Bytes that each token of the vocabulary stands for, fp64, on the same device.
        sha256: Checksums of the three sets, joined.
    """

    train: Tensor
    validation: Tensor
    test: Tensor
    lengths: Tensor
    sha256: str

    @property
    def vocabulary(self) -> int:
        """Number of different tokens."""
        return len(self.lengths)


def prepare(
    folder: Path,
    archive: Path | None = None,
    *,
    share: float = SHARE,
    vocabulary: int = VOCABULARY,
    say: Say = lambda line: None,
    on_progress: OnProgress = lambda *_: None,
) -> Manifest:
    """Make the tokens of a kernel's source in folder, in three steps: texts, tokenizer, tokens. Returns the manifest.

    A step whose files are there with their sizes and checksums is not done again, and needs no archive.

    Args:
        folder: For all files; made where it is missing.
        archive: A linux-source-6.1.tar.xz, a .deb with one, or another kernel's source as .tar; None downloads the
            Debian package.
        share: As linux.part_of's.
        vocabulary: As byte_pairs.trained_tokenizer's.
        say: Told of each step, in a line.
        on_progress: Told of the progress inside a step.

    Raises:
        DataError: The source, a tool or the package tokenizers is missing or damaged.
        OutputExistsError: folder was made with another share or vocabulary.
    """
    folder.mkdir(parents=True, exist_ok=True)
    asked = {"share": share, "vocabulary": vocabulary}
    manifest: Manifest = {"asked": asked, "files": {}}
    if (folder / MANIFEST).exists():
        manifest = _manifest(folder)
    if manifest["asked"] != asked:
        raise OutputExistsError(
            f"{folder} was made with {manifest['asked']}, not {asked}; choose another folder or move it away"
        )
    made = False
    for names, step in (
        ([f"{part}.txt" for part in PARTS], lambda: _texts(folder, archive, share, on_progress)),
        ([TOKENIZER], lambda: _tokenizer(folder, vocabulary, on_progress)),
        ([f"{part}.npy" for part in PARTS], lambda: _tokens(folder, manifest, on_progress)),
    ):
        if not made and all(is_whole(folder / name, manifest["files"].get(name)) for name in names):
            say(f"{', '.join(names)}: there, sizes and checksums are right")
            continue
        say(f"{', '.join(names)}: being made")
        made = True  # what is made from these files is made anew, too
        manifest.update(step())
        manifest["files"].update({name: described(folder / name) for name in names})
        write_manifest(folder, manifest)
    return manifest


def load_tokens(folder: Path, device: torch.device | str = "cpu") -> TokenSets:
    """The tokens in a folder that prepare or bundle.unpack made.

    Args:
        folder: With manifest.json and the three .npy.
        device: Where the tokens go.

    Raises:
        DataError: A file is missing or damaged.
    """
    manifest = read_manifest(folder)
    sets = dict[str, Tensor]()
    for part in PARTS:
        path = folder / f"{part}.npy"
        if not is_whole(path, manifest["files"].get(path.name)):
            raise DataError(f"{path} is missing or damaged; prepare or unpack the data again")
        sets[part] = torch.from_numpy(np.load(path).view(np.int16)).to(device)
    lengths = manifest["token_bytes"]
    if not (isinstance(lengths, list) and lengths and all(type(length) is int and length > 0 for length in lengths)):
        raise DataError(f"{folder / MANIFEST} does not say how many bytes its tokens have; prepare the data again")
    checksums = "".join(manifest["files"][f"{part}.npy"]["sha256"] for part in PARTS)
    bytes_of = torch.tensor(lengths, dtype=torch.float64, device=device)
    return TokenSets(**sets, lengths=bytes_of, sha256=hashlib.sha256(checksums.encode()).hexdigest())


def described(path: Path) -> dict[str, Any]:
    """Size and checksum of a file."""
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def is_whole(path: Path, known: object) -> bool:
    """Whether the file at path has the size and checksum in known."""
    return isinstance(known, dict) and path.is_file() and path.stat().st_size == known.get("size") and (
        described(path) == known
    )  # fmt: skip


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write folder/manifest.json with a checksum of itself, atomically."""
    write_atomically(folder / MANIFEST, json.dumps(with_checksum(manifest), indent=1).encode() + b"\n")


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder whose tokens are complete.

    Args:
        folder: With manifest.json.

    Raises:
        DataError: It is missing, damaged or not complete.
    """
    manifest = _manifest(folder)
    if "token_bytes" not in manifest or not all(f"{part}.npy" in manifest["files"] for part in PARTS):
        raise DataError(f"{folder} has no complete set of tokens; prepare the data again")
    return manifest


def _manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    try:
        found = read(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}; prepare or unpack the data again") from error
    if not isinstance(found, dict) or not isinstance(found.get("files"), dict) or "asked" not in found:
        raise DataError(f"{path} is not a manifest: {shown(found)}; prepare or unpack the data again")
    return found


def _texts(folder: Path, archive: Path | None, share: float, on_progress: OnProgress) -> Manifest:
    if archive is None:
        archive = fetched_archive(folder / "source")
    elif archive.suffix == ".deb":
        (folder / "source").mkdir(exist_ok=True)
        archive = unpacked_package(archive, folder / "source")
    source = read_source(archive, share, on_progress)
    for part, text in source.texts.items():
        write_atomically(folder / f"{part}.txt", bytes(text))
    return {
        "archive": {"name": archive.name, **described(archive)},
        "source_files": source.files,
        "left_out": {"copies": source.copies, "not_text": source.not_text},
        "bytes": {part: len(text) for part, text in source.texts.items()},
    }


def _tokenizer(folder: Path, vocabulary: int, on_progress: OnProgress) -> Manifest:
    made = trained_tokenizer((folder / "train.txt").read_bytes(), vocabulary, on_progress)
    write_atomically(folder / TOKENIZER, made.encode())
    return {"token_bytes": token_lengths(made)}


def _tokens(folder: Path, manifest: Manifest, on_progress: OnProgress) -> Manifest:
    made, lengths = (folder / TOKENIZER).read_text(), np.array(manifest["token_bytes"])
    counts = {}
    for part in PARTS:
        tokens = encoded(made, (folder / f"{part}.txt").read_bytes(), part, on_progress)
        if (stood_for := int(lengths[tokens].sum())) != manifest["bytes"][part]:
            raise DataError(
                f"the tokens of {part} stand for {stood_for} bytes, its text has {manifest['bytes'][part]}; "
                "this version of tokenizers is not the one of constraints.txt"
            )
        write_tokens(folder / f"{part}.npy", tokens)
        counts[part] = len(tokens)
    return {"tokens": counts}


def write_tokens(path: Path, tokens: np.ndarray[Any, Any]) -> None:
    """Write tokens as .npy, little-endian uint16, atomically.

    Args:
        path: The file to write.
        tokens: Of one dimension.
    """
    content = io.BytesIO()
    np.save(content, tokens.astype("<u2", copy=False))
    write_atomically(path, content.getvalue())
