"""Tokens as few, small files, to be carried to a machine that cannot fetch them.

A bundle holds manifest.json and, for each set, NAME.u16.xz: the tokens as little-endian uint16, compressed by LZMA2
with settings for pairs of bytes, readable by `xz --decompress` and by Python alone.
"""

import lzma
from pathlib import Path
from typing import Any

import numpy as np

from semisparse.files import write_atomically
from semisparse_lab.data.linux import PARTS, OnProgress
from semisparse_lab.data.tokens import (
    MANIFEST,
    Manifest,
    Say,
    described,
    is_whole,
    read_manifest,
    write_manifest,
    write_tokens,
)
from semisparse_lab.errors import DataError

LIMIT = 55 << 20
"""Bytes that a bundle may have."""
_FILTERS: list[dict[str, Any]] = [
    {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 1 << 28, "lc": 3, "lp": 1, "pb": 1}
]
_AT_ONCE = 1 << 22


def pack(folder: Path, out: Path, on_progress: OnProgress = lambda *_: None, say: Say = lambda line: None) -> int:
    """Write the tokens in folder as a bundle to out, and return its bytes. Files that are there and right stay.

    Args:
        folder: As tokens.prepare makes it.
        out: For the bundle; made where it is missing.
        on_progress: Told of the bytes that were compressed.
        say: Told of each file, in a line.

    Raises:
        DataError: folder is not complete, or the bundle exceeds LIMIT.
    """
    manifest = read_manifest(folder)
    out.mkdir(parents=True, exist_ok=True)
    old = read_manifest(out).get("bundle", {}) if (out / MANIFEST).exists() else {}
    files: Manifest = {}
    for part in PARTS:
        path, source = out / f"{part}.u16.xz", manifest["files"][f"{part}.npy"]
        known = old.get(path.name, {})
        if known.get("tokens") == source["sha256"] and is_whole(path, known.get("file")):
            say(f"{path.name}: there, size and checksum are right")
        else:
            tokens = np.load(folder / f"{part}.npy").tobytes()
            write_atomically(path, _compressed(tokens, part, on_progress))
        files[path.name] = {"tokens": source["sha256"], "file": described(path)}
    write_manifest(out, {**manifest, "bundle": files})
    size = sum(path.stat().st_size for path in out.iterdir() if path.name in (*files, MANIFEST))
    if size > LIMIT:
        raise DataError(f"the bundle has {size} bytes, more than {LIMIT}; prepare the data with a smaller share")
    return size


def unpack(bundle: Path, folder: Path, say: Say = lambda line: None) -> Manifest:
    """Write the tokens of a bundle to folder and return the manifest. Files that are there and right stay.

    Args:
        bundle: As pack writes it.
        folder: For the tokens; made where it is missing.
        say: Told of each file, in a line.

    Raises:
        DataError: The bundle is missing or damaged.
    """
    manifest = read_manifest(bundle)
    folder.mkdir(parents=True, exist_ok=True)
    for part in PARTS:
        packed, path = bundle / f"{part}.u16.xz", folder / f"{part}.npy"
        if is_whole(path, manifest["files"][path.name]):
            say(f"{path.name}: there, size and checksum are right")
            continue
        if not is_whole(packed, manifest.get("bundle", {}).get(packed.name, {}).get("file")):
            raise DataError(f"{packed} is missing or damaged; carry the bundle again")
        tokens = np.frombuffer(lzma.decompress(packed.read_bytes()), dtype="<u2")
        write_tokens(path, tokens)
        if not is_whole(path, manifest["files"][path.name]):
            raise DataError(f"{packed} holds other tokens than its manifest says; pack the bundle again")
        say(f"{path.name}: {len(tokens):,} tokens")
    write_manifest(folder, manifest)
    return manifest


def _compressed(content: bytes, part: str, on_progress: OnProgress) -> bytes:
    compressor, pieces = lzma.LZMACompressor(format=lzma.FORMAT_XZ, filters=_FILTERS), []
    for start in range(0, len(content), _AT_ONCE):
        pieces.append(compressor.compress(content[start : start + _AT_ONCE]))
        on_progress(f"bytes compressed, {part}", min(start + _AT_ONCE, len(content)), len(content))
    return b"".join([*pieces, compressor.flush()])
