"""The pruned matrix out of its packed form, one thread a group of four. Used where a dense product is the faster one."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from semisparse.errors import ShapeError, TensorError
from semisparse.kernels.metadata import block_groups, nibble_address
from semisparse.pattern import GROUP

ROWS, GROUPS = 16, 64
"""Rows and groups of one program."""


@triton.jit
def unpack(packed, out, rows, columns, BITS: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    """The kernel. packed: uint8; out: int64 words of four 16-bit values."""
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)[None, :]
    groups = columns // 4
    inside = (row < rows) & (group < groups)
    at = row.to(tl.int64) * groups + group
    pair = tl.load(packed.to(tl.pointer_type(tl.int32)) + at, mask=inside, other=0).to(tl.int64)
    blocks = (groups + block_groups(BITS) - 1) // block_groups(BITS)
    address = nibble_address(row, group, blocks, BITS, 0, 0)
    metadata = packed + rows.to(tl.int64) * columns
    nibble = tl.load(metadata + (address >> 1), mask=inside, other=0).to(tl.int32) >> ((address & 1) * 4).to(tl.int32)
    first, second = (nibble & 3).to(tl.int64) * 16, ((nibble >> 2) & 3).to(tl.int64) * 16
    values = ((pair & 0xFFFF) << first) | (((pair >> 16) & 0xFFFF) << second)
    tl.store(out + at, values, mask=inside)


def launch(packed: Tensor, out: Tensor, *, bits: tuple[int, ...]) -> None:
    """Write the matrix that packed holds into out. Asynchronous, on the current stream; exact.

    packed: contiguous uint8, as prune_pack.launch or NVIDIA's compressor writes it with metadata order bits. out: rows x
    columns (a multiple of 16), fp16 or bf16, contiguous. Raises ShapeError, TensorError.
    """
    rows, columns = out.shape
    if out.itemsize != 2 or not out.is_contiguous() or packed.dtype != torch.uint8 or not packed.is_contiguous():
        raise TensorError(f"out is {out.dtype}, packed {packed.dtype}; use contiguous fp16 or bf16 and uint8")
    lines = 1 << sum(bit < 32 for bit in bits)
    span = (1 << len(bits)) // lines
    needed = rows * columns + triton.cdiv(rows, lines) * lines * triton.cdiv(columns // GROUP, span) * span // 2
    if columns % 16 or packed.numel() < needed:
        raise ShapeError(f"packed has {packed.numel()} bytes; a {rows} x {columns} matrix needs {needed}")
    grid = (triton.cdiv(columns // GROUP, GROUPS), triton.cdiv(rows, ROWS))
    unpack[grid](packed, out.view(torch.int64), rows, columns, BITS=bits, ROWS=ROWS, GROUPS=GROUPS, num_warps=4)
