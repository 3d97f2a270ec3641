"""What the header of a safetensors file says, read and checked before anything is read or built for it."""

from dataclasses import dataclass
from typing import Any, BinaryIO

import torch

from semisparse_lab.strict_json import parse

LARGEST_HEADER = 4 << 20
"""Bytes; the header of a ViT of 3000 blocks is smaller."""

Kind = tuple[tuple[int, ...], torch.dtype | str]
"""Shape and dtype of a tensor; a dtype that checkpoints do not use is given by its name in the file."""

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_METADATA = "__metadata__"


@dataclass(frozen=True, slots=True)
class Header:
    """What the header of a safetensors file says.

    Attributes:
        size: Bytes of the whole file.
        metadata: Text by name.
        tensors: Kinds by name.
    """

    size: int
    metadata: dict[str, str]
    tensors: dict[str, Kind]


def read_header(file: BinaryIO, size: int) -> Header:
    """Read the header of an open file, and at most LARGEST_HEADER bytes, even if the file announces more.

    Args:
        file: The file, opened in binary mode, at its start.
        size: Size of the file in bytes.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not a whole safetensors file, or holds more than its tensors.
    """
    prefix = file.read(8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or 8 + length > size:
        raise ValueError("it is not a safetensors file, or cut off in its header")
    if length > LARGEST_HEADER:
        raise ValueError(f"its header has {length} bytes, more than the {LARGEST_HEADER} that are read at most")
    try:
        content = parse(file.read(length))
    except ValueError as error:
        raise ValueError(f"its header is not JSON ({error})") from error
    metadata = content.pop(_METADATA, {}) if isinstance(content, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its header does not list metadata and tensors")
    entries = {name: _entry(name, value) for name, value in content.items()}
    announced = 8 + length + sum(count for _, count in entries.values())
    if announced != size:
        raise ValueError(f"it has {size} bytes, its header announces {announced}")
    return Header(size, metadata, {name: kind for name, (kind, _) in entries.items()})


def kinds(tensors: dict[str, torch.Tensor]) -> dict[str, Kind]:
    """The kinds of tensors by name, as in Header.tensors."""
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def _entry(name: str, value: Any) -> tuple[Kind, int]:
    """A tensor's kind and its bytes."""
    if isinstance(value, dict) and value.keys() == {"dtype", "shape", "data_offsets"}:
        dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
        if isinstance(dtype, str) and _whole(shape) and _whole(offsets) and len(offsets) == 2:
            return (tuple(shape), _DTYPES.get(dtype, dtype[:20])), offsets[1] - offsets[0]
    raise ValueError(f"its header does not say where tensor {name[:80]!r} lies")


def _whole(values: Any) -> bool:
    """Whether values is a list of whole numbers that 64 bits hold."""
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 63 for value in values)
