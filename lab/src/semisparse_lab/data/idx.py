"""Reading idx files, the format of MNIST and Fashion-MNIST, gzip-compressed or not."""

import gzip
import math
import zlib
from pathlib import Path

import torch
from torch import Tensor

from semisparse_lab.errors import DataError

_GZIP_MAGIC = b"\x1f\x8b"
_UINT8 = 0x08
_CHUNK = 1 << 20
LARGEST = 1 << 30
"""Bytes of data that a file may announce. EMNIST, the largest of this family, has 0.6 of this."""


def find_idx(folder: Path, name: str) -> Path:
    """The path folder/name, or folder/name.gz if only that exists.

    Args:
        folder: Where to look.
        name: Without ".gz".

    Raises:
        DataError: Neither exists; the message names both.
    """
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise DataError(f"data folder {folder} has neither {name} nor {name}.gz; put the four idx files there")


def read_idx(path: Path, dimensions: int) -> Tensor:
    """The contents of an idx file of unsigned bytes as a uint8 tensor with that number of dimensions.

    Layout: two zero bytes, the type code 8, the number of dimensions, one big-endian 32-bit size each, then the data.
    Whether it is compressed is told from its first bytes, not from its name. Never reads more than the header
    announces plus one chunk, nor announcements of more than LARGEST.

    Args:
        path: The file, gzip-compressed or not.
        dimensions: That the header has to announce.

    Raises:
        DataError: The file cannot be read, is not such an idx file, is a damaged gzip file, announces no data or too
            much, or holds another number of bytes than its header says.
    """
    try:
        with path.open("rb") as raw:
            compressed = raw.read(2) == _GZIP_MAGIC
        with gzip.open(path) if compressed else path.open("rb") as file:
            shape = _read_shape(path, file.read(4 + 4 * dimensions), dimensions)
            expected = _announced(path, shape)
            data = bytearray()
            while len(data) <= expected and (chunk := file.read(_CHUNK)):
                data += chunk
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path} is a damaged gzip file ({error}); fetch it again") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    if len(data) != expected:
        found = f"at least {len(data)}" if len(data) > expected else str(len(data))
        raise DataError(
            f"{path} announces {' x '.join(map(str, shape))} = {expected} bytes of data but holds {found}; "
            "fetch it again"
        )
    return torch.frombuffer(data, dtype=torch.uint8).reshape(shape)


def _announced(path: Path, shape: tuple[int, ...]) -> int:
    """The bytes that a header announces, checked before anything is read or allocated for them."""
    expected = math.prod(shape)
    if not 0 < expected <= LARGEST:
        limits = "no data" if expected == 0 else f"more than the {LARGEST} bytes that are read at most"
        raise DataError(f"{path} announces {' x '.join(map(str, shape))} = {expected} bytes, {limits}; fetch it again")
    return expected


def _read_shape(path: Path, header: bytes, dimensions: int) -> tuple[int, ...]:
    magic = _UINT8 << 8 | dimensions
    found = int.from_bytes(header[:4])
    if len(header) < 4 or found != magic:
        raise DataError(f"{path} starts with 0x{header[:4].hex()}, not with the idx magic number 0x{magic:08x}")
    if len(header) < 4 + 4 * dimensions:
        raise DataError(f"{path} ends in its header: expected {4 + 4 * dimensions} bytes, found {len(header)}")
    return tuple(int.from_bytes(header[4 + 4 * i : 8 + 4 * i]) for i in range(dimensions))
