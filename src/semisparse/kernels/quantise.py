"""One pass over a matrix x (M x K): round it to e4m3 with one scale, and write it row by row, transposed, or both.

Bit for bit as reference/fp8.py. The scale comes from the maxima that amax.py left on the device.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from semisparse.errors import ConfigError, ShapeError, TensorError
from semisparse.formats.layout import ALIGNMENT, round_up
from semisparse.kernels import amax
from semisparse.kernels.e4m3 import codes, inverse, largest_word, multiplier_for, native_on, pack_four
from semisparse.kernels.grid import INT32_END, block_at, grid_of
from semisparse.kernels.launcher import Launcher

MULTIPLE = 16
"""Rows of zeros are added up to a multiple of this, and columns are one."""


class Block(NamedTuple):
    """What one program covers.

    Attributes:
        fours: Groups of four rows, a power of two.
        columns: Columns, a power of two.
        warps: Warps per program.
        registers: Most registers per thread; None leaves it to the compiler.
    """

    fours: int
    columns: int
    warps: int
    registers: int | None = None


BLOCK = Block(fours=64, columns=64, warps=8)
"""The best of 15 when both layouts are written: 92 % of copy rate at 13008 x 4096, 95 % and more at four larger ones
(one NVIDIA H100, bf16)."""


@triton.jit(do_not_specialize=("rows", "rows_padded", "columns", "stride", "count"))
def quantise(
    x, partials, x8, x8t, scale, rows, rows_padded, columns, stride, count,
    PIECE: tl.constexpr, FOURS: tl.constexpr, COLUMNS: tl.constexpr, WORDS: tl.constexpr, EVEN: tl.constexpr,
    WIDE: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """The kernel; see launch for the arguments.

    x8t: int32 words, each of four rows. stride: in 16 bytes, PIECE elements; rows_padded, columns: in 16. So Triton
    knows that they are whole. EVEN: every program lies inside of x. WIDE: the grid is flat, and offsets within a
    program may need 64 bits as well.
    """
    rows_padded, columns, stride = rows_padded * 16, columns * 16, stride * PIECE
    row_words, line = rows_padded // 4, columns
    if WIDE:
        stride, row_words, line = tl.cast(stride, tl.int64), tl.cast(row_words, tl.int64), tl.cast(columns, tl.int64)
    down, right = block_at(columns, COLUMNS, WIDE)
    four = tl.arange(0, FOURS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    first_four, first_column = down * FOURS, right * COLUMNS
    inside = (first_four + four < row_words) & (first_column + column < columns)
    start = x + (4 * first_four).to(tl.int64) * stride + first_column
    lines = ()
    for i in tl.static_range(4):
        present = inside
        if not EVEN:
            present = inside & (4 * (first_four + four) + i < rows)
            lines = lines + (tl.load(start + (4 * four + i) * stride + column, mask=present, other=0.0),)
        else:
            lines = lines + (tl.load(start + (4 * four + i) * stride + column),)
    factor = multiplier_for(largest_word(partials, count, WORDS))
    if (down == 0) & (right == 0):
        tl.store(scale, inverse(factor))
    values = ()
    for i in tl.static_range(4):
        value = lines[i].to(tl.float32) * factor
        if not EVEN:  # the padding is zero where the scale is NaN, too
            value = tl.where(4 * (first_four + four) + i < rows, value, 0.0)
        values = values + (value,)
    if x8 is not None:
        out = x8 + (4 * first_four).to(tl.int64) * line + first_column
        for i in tl.static_range(4):
            tl.store(out + (4 * four + i) * line + column, codes(values[i], NATIVE), mask=inside)
    if x8t is not None:
        words = pack_four(values[0], values[1], values[2], values[3], NATIVE)
        out = x8t + first_column.to(tl.int64) * row_words + first_four
        tl.store(out + column * row_words + four, words, mask=inside)


def launch(
    x: Tensor,
    partials: Tensor,
    x8: Tensor | None,
    x8t: Tensor | None,
    scale: Tensor,
    *,
    block: Block = BLOCK,
) -> Launcher:
    """Round a matrix to e4m3. Asynchronous, on the device's current stream.

    Args:
        x: M x K, as amax.readable gives it.
        partials: What amax.launch left of x, or of what x is a part of.
        x8: M' x K, contiguous, of one-byte elements, M' being M rounded up to MULTIPLE; None to leave it out.
        x8t: K x M', the same for the transpose. Zeros are written into the padding of both.
        scale: One fp32 element, which receives the inverse of the multiplier.
        block: What one program covers.

    Returns:
        What was launched. Its pointers are x, partials, x8, x8t and scale.

    Raises:
        ShapeError: A size does not fit.
        TensorError: A dtype or a memory layout does not fit.
        ConfigError: x8 and x8t are both None.
    """
    amax.check_readable(x)
    amax.check_partials(partials, partials.numel())
    rows, columns = x.shape
    padded = round_up(rows, MULTIPLE)
    for name, out, shape in (("x8", x8, (padded, columns)), ("x8t", x8t, (columns, padded))):
        if out is not None and (out.itemsize != 1 or out.shape != shape or not out.is_contiguous()):
            raise ShapeError(f"{name} is {out.dtype} {tuple(out.shape)}; it must be {shape}, contiguous, in bytes")
    if scale.dtype != torch.float32 or scale.numel() != 1:
        raise TensorError(f"scale is {scale.dtype} {tuple(scale.shape)}; it must be one float32 element")
    stride, given, index = x.stride(0) * x.itemsize // ALIGNMENT, (x8 is not None, x8t is not None), x.get_device()
    start = _prepare((rows, padded, columns, stride, partials.numel()), x.dtype, given, block, native_on(index))
    bytes_of = None if x8 is None else x8.view(torch.uint8)
    words_of = None if x8t is None else x8t.view(torch.int32)
    start(index, x, partials, bytes_of, words_of, scale)
    return start


@lru_cache(4096)
def _prepare(
    sizes: tuple[int, int, int, int, int],
    dtype: torch.dtype,
    given: tuple[bool, bool],
    block: Block,
    native: bool,
) -> Launcher:
    """All of a launch that does not change while shapes repeat.

    Args:
        sizes: Rows, rows with padding, columns, stride in 16 bytes, number of partial maxima.
        dtype: Of x.
        given: Whether x8 is, and x8t.
        block: What one program covers.
        native: Whether the GPU converts to e4m3.
    """
    rows, padded, columns, stride, count = sizes
    if not any(given):
        raise ConfigError("x8 and x8t are both None: pass the tensor that is to be written")
    height, piece = 4 * block.fours, ALIGNMENT // dtype.itemsize
    span = max(height * max(stride * piece, columns), block.columns * padded // 4)
    even = not (rows % height or columns % block.columns)
    grid, wide = grid_of(padded, columns, height, block.columns, flat=span >= INT32_END)
    return Launcher(
        quantise,
        grid,
        (rows, padded // MULTIPLE, columns // MULTIPLE, stride, count),
        (piece, block.fours, block.columns, amax.words_for(count), even, wide, native),
        num_warps=block.warps,
        maxnreg=None if wide else block.registers,
    )
