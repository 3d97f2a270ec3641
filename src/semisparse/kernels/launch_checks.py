"""What the launch functions take, and the errors for what they cannot. Needs no triton."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from semisparse.errors import ConfigError, ShapeError, TensorError
from semisparse.pattern import GROUP

MODES = ("transposable", "codes", "row", "soft")
"""What a tile keeps: the best transposable tile; a given code; the 2 largest of each row; these, shrunk."""

GROUP_BIT = 32
"""Added to the index of a group bit in a metadata order, to tell it from a row bit."""

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Block:
    """Tile rows (a multiple of 8) and tile pairs (of 4) of one program, its warps, and the registers of a thread."""

    tile_rows: int = 16
    pairs: int = 8
    warps: int = 4
    registers: int | None = 120


DEFAULT_BLOCK = Block()
"""The fewest registers with which no variant spills on sm80, sm90 or sm100."""

HOPPER_BLOCK = Block(tile_rows=16, pairs=16, warps=8, registers=80)
"""For 16-bit matrices on sm90, where nothing spills with it. Chosen by timing on one H200; no result file is kept."""


def check_sizes(
    rows: int,
    rows_padded: int,
    columns: int,
    types: tuple[torch.dtype, torch.dtype],
    mode: str,
    transposed: bool,
    bits: tuple[int, ...],
    block: Block,
) -> None:
    """Raise ShapeError, TensorError or ConfigError unless prune_pack can take such a matrix. types: read, written."""
    if types[0] not in _DTYPES or types[1] not in (torch.float16, torch.bfloat16):
        raise TensorError(f"matrix is {types[0]}, packed as {types[1]}; use fp32, fp16 or bf16, packed as fp16 or bf16")
    if columns % 16 or rows_padded % 16 or rows_padded < rows:
        raise ShapeError(f"matrix is {rows} x {columns}, padded to {rows_padded} rows; both must be multiples of 16")
    if transposed and mode in ("row", "soft"):
        raise ConfigError(f"mode={mode!r} keeps 2:4 along the columns only: pass packed_t=None")
    lines, span = block_shape(bits)
    if any(size % lines for size in (4 * block.tile_rows, 8 * block.pairs)) or any(
        size % span for size in (block.tile_rows, 2 * block.pairs)
    ):
        raise ConfigError(f"a program of {block} does not hold whole metadata blocks of {lines} rows x {span} groups")


def check_choice(mode: str, codes: Tensor | None, scale: Tensor | None, rows: int, columns: int) -> None:
    """Raise ConfigError, TensorError or ShapeError unless mode is known and has what it needs."""
    if mode not in MODES:
        raise ConfigError(f"mode={mode!r} is not one of {', '.join(map(repr, MODES))}")
    if mode == "codes":
        if codes is None or codes.dtype != torch.int16 or not codes.is_contiguous():
            raise TensorError("mode='codes' needs codes, contiguous int16 tile codes")
        if codes.shape != (wanted := (rows // GROUP, columns // GROUP)):
            raise ShapeError(f"codes has shape {tuple(codes.shape)}; it must be {wanted}")
    if mode == "soft" and (scale is None or scale.dtype != torch.float32 or scale.numel() != 1):
        raise TensorError("mode='soft' needs scale, one float32 element on the device of matrix")


def check_buffers(packed: Tensor, packed_t: Tensor | None, rows: int, columns: int, bits: tuple[int, ...]) -> None:
    """check_buffer for a rows x columns matrix and, where it is wanted, for its transpose."""
    check_buffer("packed", packed, rows, columns, bits)
    if packed_t is not None:
        check_buffer("packed_t", packed_t, columns, rows, bits)


def check_buffer(name: str, buffer: Tensor, rows: int, columns: int, bits: tuple[int, ...]) -> None:
    """Raise TensorError or ShapeError unless buffer can hold a packed rows x columns matrix of 16-bit values."""
    needed = _bytes_needed(rows, columns, bits)
    if buffer.dtype != torch.uint8 or not buffer.is_contiguous():
        raise TensorError(f"{name} is {buffer.dtype}; it must be a contiguous uint8 tensor")
    if buffer.numel() < needed:
        raise ShapeError(f"{name} has {buffer.numel()} bytes; a {rows} x {columns} matrix needs {needed}")


def block_shape(bits: tuple[int, ...]) -> tuple[int, int]:
    """Rows and groups of a metadata block."""
    rows = sum(bit < GROUP_BIT for bit in bits)
    return 1 << rows, 1 << (len(bits) - rows)


@lru_cache(4096)
def _bytes_needed(rows: int, columns: int, bits: tuple[int, ...]) -> int:
    lines, span = block_shape(bits)
    return rows * columns + -(-rows // lines) * lines * -(-(columns // GROUP) // span) * span // 2
