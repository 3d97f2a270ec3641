"""y * (scale_a * scale_b) + bias, rounded once: the product of two tensors from that of their codes."""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from semisparse.errors import ShapeError, TensorError
from semisparse.kernels.amax import TYPES
from semisparse.kernels.grid import block_at, grid_of
from semisparse.kernels.launcher import Launcher
from semisparse.kernels.packed_values import rounded_bits

ROWS, COLUMNS, WARPS = 4, 512, 4
"""Rows and columns of one program, and its warps: at least 99 % of copy rate at five sizes (one NVIDIA H100)."""


@triton.jit
def rescale(
    y, scale_a, scale_b, bias, out, rows, columns,
    TYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, FLAT: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """The kernel. columns: in 16; y and out: contiguous, of as many columns; TYPE: what is written."""
    columns = columns * 16
    down, right = block_at(columns, COLUMNS, FLAT)
    column = right * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    row = down * ROWS + tl.arange(0, ROWS)[:, None]
    inside = (row < rows) & (column < columns)
    at = row.to(tl.int64) * columns + column
    result = tl.load(y + at, mask=inside).to(tl.float32) * (tl.load(scale_a) * tl.load(scale_b))
    if bias is not None:
        result += tl.load(bias + column, mask=column < columns).to(tl.float32)
    if NATIVE or TYPE == tl.float32:
        result = result.to(TYPE)
    else:  # the interpreter truncates to bf16
        result = rounded_bits(result, TYPE).to(tl.int16).to(TYPE, bitcast=True)
    tl.store(out + at, result, mask=inside)


def launch(y: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None, out: Tensor) -> Launcher:
    """out = y * (scale_a * scale_b) + bias, for as many rows as out has. Asynchronous, on the current stream.

    Args:
        y: M' x N, contiguous, fp32, fp16 or bf16, N a multiple of 16.
        scale_a: One fp32 element.
        scale_b: One fp32 element.
        bias: (N,), contiguous, fp32, fp16 or bf16, or None.
        out: M x N, contiguous, fp32, fp16 or bf16, M at most M'. It may be y, or its first rows.

    Returns:
        What was launched. Its pointers are y, scale_a, scale_b, bias and out.

    Raises:
        ShapeError: The sizes differ.
        TensorError: A dtype or a memory layout does not fit.
    """
    rows, columns = out.shape
    for name, tensor in (("y", y), ("bias", bias), ("out", out)):
        if tensor is not None and not (tensor.dtype in TYPES and tensor.is_contiguous()):
            raise TensorError(f"{name} is {tensor.dtype}; it must be contiguous fp32, fp16 or bf16")
    for name, scale in (("scale_a", scale_a), ("scale_b", scale_b)):
        if scale.dtype != torch.float32 or scale.numel() != 1:
            raise TensorError(f"{name} is {scale.dtype} {tuple(scale.shape)}; it must be one float32 element")
    if y.dim() != 2 or y.shape[1] != columns or y.shape[0] < rows or columns % 16 or not out.numel():
        raise ShapeError(f"out has shape {tuple(out.shape)}, y {tuple(y.shape)}; out must be rows of y, N % 16 == 0")
    if bias is not None and bias.shape != (columns,):
        raise ShapeError(f"bias has shape {tuple(bias.shape)}; it must be ({columns},)")
    index = out.get_device()
    start = _prepare(rows, columns, (y.dtype, out.dtype, None if bias is None else bias.dtype), index >= 0)
    start(index, y, scale_a, scale_b, bias, out)
    return start


@lru_cache(4096)
def _prepare(
    rows: int, columns: int, dtypes: tuple[torch.dtype, torch.dtype, torch.dtype | None], native: bool
) -> Launcher:
    """dtypes: of y, out and bias. The kernel is compiled for them."""
    grid, flat = grid_of(rows, columns, ROWS, COLUMNS)
    constants = TYPES[dtypes[1]], ROWS, COLUMNS, flat, native
    # Not fused: a product that overflows or underflows is rounded before the sum, as in PyTorch.
    return Launcher(rescale, grid, (rows, columns // 16), constants, num_warps=WARPS, enable_fp_fusion=False)
