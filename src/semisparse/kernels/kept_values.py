"""The two kept values of each group of four, side by side, and back: what travels instead of a pruned matrix.

Both kernels move bits and never compute with them, so a value may be of any dtype of 1, 2, 4 or 8 bytes.
"""

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from semisparse.errors import ShapeError, TensorError
from semisparse.kernels.grid import block_at, grid_of
from semisparse.kernels.launcher import Launcher
from semisparse.pattern import GROUP, KEPT

ROWS, GROUPS = 16, 64
"""Rows and groups of one program."""

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@triton.jit
def _kept_two(codes, row, group, groups, inside):
    """Which two of its four entries each group keeps; if bits are not exactly two, then the lowest and the highest."""
    code = tl.load(codes + (row // 4).to(tl.int64) * groups + group, mask=inside, other=3).to(tl.int32)
    bits = code >> (4 * (row % 4))
    first = tl.where((bits & 1) != 0, 0, tl.where((bits & 2) != 0, 1, tl.where((bits & 4) != 0, 2, 3)))
    second = tl.where((bits & 8) != 0, 3, tl.where((bits & 4) != 0, 2, tl.where((bits & 2) != 0, 1, 0)))
    return first, second


@triton.jit
def _places(row, rows, groups, right, WIDTH: tl.constexpr, GROUPS: tl.constexpr):
    """Where this program's entries lie in a matrix with WIDTH entries per group, and which of them there are."""
    column = right * (WIDTH * GROUPS) + tl.arange(0, WIDTH * GROUPS)[None, :]
    return row.to(tl.int64) * (WIDTH * groups) + column, (row < rows) & (column < WIDTH * groups)


@triton.jit
def keep(matrix, codes, values, rows, groups, ROWS: tl.constexpr, GROUPS: tl.constexpr, FLAT: tl.constexpr):
    """The kernel of keep_values. matrix and values: integers of one size."""
    down, right = block_at(groups, GROUPS, FLAT)
    row = down * ROWS + tl.arange(0, ROWS)[:, None]
    group = right * GROUPS + tl.arange(0, GROUPS)[None, :]
    first, second = _kept_two(codes, row, group, groups, (row < rows) & (group < groups))
    at, inside = _places(row, rows, groups, right, 4, GROUPS)
    entries = tl.reshape(tl.load(matrix + at, mask=inside), (ROWS, GROUPS, 2, 2))
    even, odd = tl.split(entries)
    entry0, entry2 = tl.split(even)
    entry1, entry3 = tl.split(odd)
    low = tl.where(first == 0, entry0, tl.where(first == 1, entry1, tl.where(first == 2, entry2, entry3)))
    high = tl.where(second == 3, entry3, tl.where(second == 2, entry2, tl.where(second == 1, entry1, entry0)))
    at, inside = _places(row, rows, groups, right, 2, GROUPS)
    tl.store(values + at, tl.interleave(low, high), mask=inside)


@triton.jit
def spread(values, codes, matrix, rows, groups, ROWS: tl.constexpr, GROUPS: tl.constexpr, FLAT: tl.constexpr):
    """The kernel of spread_values. matrix and values: integers of one size."""
    down, right = block_at(groups, GROUPS, FLAT)
    row = down * ROWS + tl.arange(0, ROWS)[:, None]
    group = right * GROUPS + tl.arange(0, GROUPS)[None, :]
    first, second = _kept_two(codes, row, group, groups, (row < rows) & (group < groups))
    at, inside = _places(row, rows, groups, right, 2, GROUPS)
    low, high = tl.split(tl.reshape(tl.load(values + at, mask=inside), (ROWS, GROUPS, 2)))
    entry0 = tl.where(first == 0, low, tl.where(second == 0, high, 0))
    entry1 = tl.where(first == 1, low, tl.where(second == 1, high, 0))
    entry2 = tl.where(first == 2, low, tl.where(second == 2, high, 0))
    entry3 = tl.where(first == 3, low, tl.where(second == 3, high, 0))
    entries = tl.interleave(tl.interleave(entry0, entry2), tl.interleave(entry1, entry3))
    at, inside = _places(row, rows, groups, right, 4, GROUPS)
    tl.store(matrix + at, entries, mask=inside)


def keep_values(matrix: Tensor, codes: Tensor, values: Tensor) -> None:
    """Write what tile codes keep of a matrix. Asynchronous, on the current stream of its device.

    Args:
        matrix: R x C, multiples of 4, contiguous.
        codes: int16, R/4 x C/4, contiguous, as ops.tile_codes gives them; each group of 4 along the columns keeps two.
        values: R x C/2, contiguous, of matrix's dtype: for each group its two kept values in order.

    Raises:
        ShapeError: The sizes do not fit.
        TensorError: A dtype or a memory layout does not fit.
    """
    _launch(keep, matrix, codes, values, (matrix, codes, values))


def spread_values(values: Tensor, codes: Tensor, matrix: Tensor) -> None:
    """The inverse of keep_values: write the pruned matrix, with zeros where codes keep nothing.

    Args:
        values: As keep_values'.
        codes: As keep_values'.
        matrix: As keep_values', written.

    Raises:
        ShapeError, TensorError: As keep_values.
    """
    _launch(spread, matrix, codes, values, (values, codes, matrix))


def _launch(kernel: Any, matrix: Tensor, codes: Tensor, values: Tensor, operands: tuple[Tensor, ...]) -> None:
    if (
        matrix.dtype != values.dtype
        or codes.dtype != torch.int16
        or not all(operand.is_contiguous() for operand in operands)
    ):
        raise TensorError(
            f"matrix is {matrix.dtype}, values {values.dtype}, codes {codes.dtype}; the first two must be of one dtype "
            "and codes int16, all contiguous"
        )
    rows, columns = matrix.shape
    shapes = (rows // GROUP, columns // GROUP), (rows, columns // GROUP * KEPT)
    if rows % GROUP or columns % GROUP or (codes.shape, values.shape) != shapes:
        raise ShapeError(
            f"matrix is {rows} x {columns}, codes {tuple(codes.shape)}, values {tuple(values.shape)}; for multiples of "
            f"{GROUP} they must be {shapes[0]} and {shapes[1]}"
        )
    if matrix.numel():
        integer = _INTEGERS[matrix.itemsize]
        pointers = [operand if operand is codes else operand.view(integer) for operand in operands]
        _prepare(kernel, rows, columns // GROUP, integer)(matrix.get_device(), *pointers)


@lru_cache(4096)
def _prepare(kernel: Any, rows: int, groups: int, dtype: torch.dtype) -> Launcher:
    """dtype is only a key: the kernel is compiled for it."""
    grid, flat = grid_of(rows, groups, ROWS, GROUPS)
    return Launcher(kernel, grid, (rows, groups), (ROWS, GROUPS, flat), num_warps=4)
