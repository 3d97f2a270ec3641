"""Unpack the pruned matrix, one thread per group of four. Used where a dense product is faster."""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from semisparse.errors import ShapeError, TensorError
from semisparse.formats.layout import MetadataLayout, sparse_multiple
from semisparse.kernels.grid import block_at, grid_of
from semisparse.kernels.launch_checks import check_buffer
from semisparse.kernels.launcher import Launcher
from semisparse.kernels.packed_metadata import block_groups, nibble_address
from semisparse.pattern import GROUP

ROWS, GROUPS = 16, 64
"""Rows and groups of one program."""


@triton.jit
def unpack(
    packed, out, rows, columns,
    BITS: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr, FLAT: tl.constexpr, PAIR: tl.constexpr,
):  # fmt: skip
    """The kernel. packed: uint8; out: integers of four values; PAIR: the type of an integer of two."""
    WORD: tl.constexpr = out.dtype.element_ty
    SIZE: tl.constexpr = PAIR.primitive_bitwidth // 2  # bits of a value
    LOWER: tl.constexpr = (1 << SIZE) - 1
    groups = columns // 4
    down, right = block_at(groups, GROUPS, FLAT)
    row = down * ROWS + tl.arange(0, ROWS)[:, None]
    group = right * GROUPS + tl.arange(0, GROUPS)[None, :]
    inside = (row < rows) & (group < groups)
    at = row.to(tl.int64) * groups + group
    pair = tl.load(packed.to(tl.pointer_type(PAIR)) + at, mask=inside, other=0).to(WORD)
    blocks = (groups + block_groups(BITS) - 1) // block_groups(BITS)
    address = nibble_address(row, group, blocks, BITS, 0, 0)
    metadata = packed + tl.cast(rows, tl.int64) * (columns // (16 // SIZE))
    nibble = tl.load(metadata + (address >> 1), mask=inside, other=0).to(tl.int32) >> ((address & 1) * 4).to(tl.int32)
    first, second = (nibble & 3).to(WORD) * SIZE, ((nibble >> 2) & 3).to(WORD) * SIZE
    values = ((pair & LOWER) << first) | (((pair >> SIZE) & LOWER) << second)
    tl.store(out + at, values, mask=inside)


def launch(packed: Tensor, out: Tensor, *, layout: MetadataLayout) -> Launcher:
    """Write the matrix that packed holds into out. Asynchronous, on the current stream; exact.

    Args:
        packed: Contiguous uint8, as prune_pack.launch or NVIDIA's compressor writes it.
        out: rows x columns, contiguous: fp16 or bf16, columns a multiple of 16, or e4m3, columns a multiple of 32.
        layout: Of the metadata in packed.

    Returns:
        What was launched. Its pointers are packed and out.

    Raises:
        ShapeError: A size does not fit.
        TensorError: A dtype or a memory layout does not fit.
    """
    rows, columns = out.shape
    if out.itemsize > 2 or not out.is_contiguous():
        raise TensorError(f"out is {out.dtype}; it must be contiguous fp16, bf16 or e4m3")
    if columns % (multiple := sparse_multiple(out.dtype)):
        raise ShapeError(f"out is {rows} x {columns}; its columns must be a multiple of {multiple}")
    check_buffer("packed", packed, rows, columns, layout, out.itemsize)
    start = _prepare(rows, columns, layout, out.itemsize)
    start(out.get_device(), packed, out.view(torch.int64 if out.itemsize == 2 else torch.int32))
    return start


@lru_cache(4096)
def _prepare(rows: int, columns: int, layout: MetadataLayout, itemsize: int) -> Launcher:
    grid, flat = grid_of(rows, columns, ROWS, GROUP * GROUPS)
    pair = tl.int32 if itemsize == 2 else tl.int16
    return Launcher(unpack, grid, (rows, columns), (layout.bits, ROWS, GROUPS, flat, pair), num_warps=4)
