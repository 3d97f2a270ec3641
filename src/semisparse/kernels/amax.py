"""The largest magnitude of a matrix, or of each of many: an integer maximum over the bits of |x|, NaN above Inf.

As reference/fp8.py's largest_magnitude, exact and the same each time. A launch leaves one maximum per program, a few
hundred words: whoever needs the result reduces them (e4m3.largest_word), so that nothing is set to zero before a launch
and nothing waits between programs. launch_scale makes the scale of them.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from semisparse.errors import ShapeError, TensorError
from semisparse.formats.layout import ALIGNMENT
from semisparse.kernels.e4m3 import inverse, largest_word, multiplier_for
from semisparse.kernels.grid import LARGEST_SIZE
from semisparse.kernels.launcher import Launcher

ROWS, COLUMNS, WARPS = 8, 512, 4
"""Rows of a program's block, its columns in 32-bit words, and its warps: a thread reads 16 bytes of each row."""

MOST_PROGRAMS = 512
"""Of a matrix: few enough for every program of a later kernel to reduce their maxima, and four per multiprocessor."""

TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit
def _fp32_bits(wide, narrow, TYPE: tl.constexpr):
    """The bits of the fp32 number of the largest magnitude, from maxima of words and of their lower halves."""
    if TYPE == tl.float32:
        bits = wide
    else:
        half = tl.maximum(wide >> 16, narrow)
        if TYPE == tl.bfloat16:
            bits = half << 16
        else:
            bits = half.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32).to(tl.int32, bitcast=True)
    return bits


@triton.jit
def partial_maximum(
    matrix, rows, columns, stride, first, blocks, step,
    TYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The maximum of every step-th block of a matrix from block `first` on, as bits of an fp32 number.

    matrix: int32 words. columns, stride: in 16 bytes, so that Triton knows that they are whole.
    """
    columns, stride = columns * 4, stride * 4
    across = (columns + COLUMNS - 1) // COLUMNS
    wide = tl.zeros((COLUMNS,), tl.int32)
    narrow = tl.zeros((COLUMNS,), tl.int32)
    block = first
    while block < blocks:
        down = block // across
        column = (block - down * across) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        row = down * ROWS + tl.arange(0, ROWS)[:, None]
        inside = (row < rows) & (column < columns)
        words = tl.load(matrix + row.to(tl.int64) * stride + column, mask=inside, other=0)
        wide = tl.maximum(wide, tl.max(words & 0x7FFFFFFF, axis=0))
        if TYPE != tl.float32:  # the upper halves decide about whole words
            narrow = tl.maximum(narrow, tl.max(words & 0x7FFF, axis=0))
        block += step
    return _fp32_bits(tl.max(wide, axis=0), tl.max(narrow, axis=0), TYPE)


@triton.jit
def amax(
    matrix, partials, rows, columns, stride, blocks,
    TYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The kernel: program k takes block k and every following one whose distance is the number of programs."""
    program = tl.program_id(0)
    found = partial_maximum(
        matrix, rows, columns, stride, program, blocks, tl.num_programs(0), TYPE, ROWS, COLUMNS
    )  # fmt: skip
    tl.store(partials + program, found)


@triton.jit
def scale_of(partials, starts, scales, count, WORDS: tl.constexpr):
    """The kernel: the scale of each program's matrix.

    starts: where the maxima of each matrix start and, behind that, where they end; None for a single one with `count`.
    """
    member = tl.program_id(0)
    if starts is not None:
        start = tl.load(starts + member)
        partials += start
        count = tl.load(starts + member + 1) - start
    tl.store(scales + member, inverse(multiplier_for(largest_word(partials, count, WORDS))))


def launch(matrix: Tensor, partials: Tensor) -> Launcher:
    """Write the maxima of a matrix's programs. Asynchronous, on the device's current stream.

    Args:
        matrix: M x K, as readable gives it.
        partials: programs_for(matrix) words, int32 and contiguous: bits of fp32 numbers.

    Returns:
        What was launched. Its pointers are matrix and partials.

    Raises:
        ShapeError: A size does not fit.
        TensorError: A dtype or a memory layout does not fit.
    """
    check_readable(matrix)
    start, programs = _prepare(*extent(matrix), matrix.dtype)
    check_partials(partials, programs)
    start(matrix.get_device(), matrix.view(torch.int32), partials)
    return start


def launch_scale(partials: Tensor, scale: Tensor) -> Launcher:
    """Write the scale of a matrix from the maxima of its programs. Asynchronous, on the device's current stream.

    Args:
        partials: As launch wrote them.
        scale: One fp32 element.

    Returns:
        What was launched. Its pointers are partials, None and scale.

    Raises:
        TensorError: A dtype does not fit.
    """
    check_partials(partials, partials.numel())
    if scale.dtype != torch.float32 or scale.numel() != 1:
        raise TensorError(f"scale is {scale.dtype} {tuple(scale.shape)}; it must be one float32 element")
    start = _prepare_scale(partials.numel())
    start(partials.get_device(), partials, None, scale)
    return start


def is_readable(matrix: Tensor) -> bool:
    """Whether the rows of a matrix can be read in 16-byte pieces."""
    apart = matrix.stride(0) * matrix.itemsize
    return matrix.stride(1) == 1 and apart % ALIGNMENT == 0 and matrix.data_ptr() % ALIGNMENT == 0


def readable(matrix: Tensor) -> Tensor:
    """matrix itself if is_readable, else a contiguous copy."""
    return matrix if is_readable(matrix) else matrix.clone(memory_format=torch.contiguous_format)


def check_readable(matrix: Tensor) -> None:
    """Raise TensorError or ShapeError unless matrix is one that the kernels of fp8 read."""
    if matrix.dtype not in TYPES:
        raise TensorError(f"matrix is {matrix.dtype}; use fp32, fp16 or bf16")
    if matrix.dim() != 2 or matrix.shape[1] % 16 or not matrix.numel() or max(matrix.shape) > LARGEST_SIZE:
        raise ShapeError(
            f"matrix has shape {tuple(matrix.shape)}; it must be M x K with K a multiple of 16, neither of them 0 "
            f"nor above {LARGEST_SIZE}"
        )
    if not is_readable(matrix):
        raise TensorError(f"matrix has strides {matrix.stride()}; its rows must lie at multiples of {ALIGNMENT} bytes")


def extent(matrix: Tensor) -> tuple[int, int, int]:
    """Rows, columns and stride (the last two in 16 bytes) as which a matrix is read: as whole blocks if it can be."""
    rows, columns = matrix.shape
    pieces, width = columns * matrix.itemsize // ALIGNMENT, COLUMNS * 4 // ALIGNMENT
    if matrix.is_contiguous() and rows * pieces % width == 0:
        return rows * pieces // width, width, width
    return rows, pieces, matrix.stride(0) * matrix.itemsize // ALIGNMENT


def blocks_of(rows: int, columns: int) -> int:
    """Blocks of a matrix with such an extent."""
    return -(-rows // ROWS) * -(-columns * 4 // COLUMNS)


def programs_for(matrix: Tensor) -> int:
    """Programs of a launch for a readable matrix, each of which writes a word."""
    return min(blocks_of(*extent(matrix)[:2]), MOST_PROGRAMS)


def words_for(count: int) -> int:
    """How many maxima a kernel that reduces `count` of them is compiled for: one, or as many as there can be.

    Not the next power of two, so that few variants are compiled.
    """
    return 1 if count == 1 else max(MOST_PROGRAMS, triton.next_power_of_2(count))


def check_partials(partials: Tensor, programs: int) -> None:
    """Raise TensorError or ShapeError unless partials are maxima of so many programs."""
    if partials.dtype != torch.int32 or not partials.is_contiguous():
        raise TensorError(f"partials is {partials.dtype}; it must be contiguous int32")
    if partials.shape != (programs,):
        raise ShapeError(f"partials has shape {tuple(partials.shape)}; it must be ({programs},)")


@lru_cache(4096)
def _prepare(rows: int, columns: int, stride: int, dtype: torch.dtype) -> tuple[Launcher, int]:
    blocks = blocks_of(rows, columns)
    programs = min(blocks, MOST_PROGRAMS)
    sizes, constants = (rows, columns, stride, blocks), (TYPES[dtype], ROWS, COLUMNS)
    return Launcher(amax, (programs, 1, 1), sizes, constants, num_warps=WARPS), programs


@lru_cache(4096)
def _prepare_scale(count: int) -> Launcher:
    return Launcher(scale_of, (1, 1, 1), (count,), (triton.next_power_of_2(count),), num_warps=1)
