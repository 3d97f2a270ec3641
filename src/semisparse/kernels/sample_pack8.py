"""sample_pack for fp8, one pass over a gradient dy (M x N): write dy in e4m3, and S(dy) packed in e4m3.

The sample is packed as the operand A = S(dy^T) (N x M) of the weight gradient. The sums of dy's columns, for the bias,
are made on the way. Both scales follow from the maxima that amax.py left on the device.

Stacks, stores of columns and metadata are those of prune_pack8.py's transpose. Bit for bit as reference/mvue_fp8.py and
reference/fp8.py.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from semisparse import sampling
from semisparse.errors import ConfigError, ShapeError, TensorError
from semisparse.formats.layout import ALIGNMENT, FP8, SPARSE_MULTIPLE_8BIT, MetadataLayout
from semisparse.kernels import amax, e4m3, mvue
from semisparse.kernels.grid import INT32_END, block_at, grid_of
from semisparse.kernels.launch_checks import check_buffer
from semisparse.kernels.launcher import Launcher
from semisparse.kernels.packed_metadata import repeated, store_stacked_metadata
from semisparse.kernels.packed_values import load_line, score
from semisparse.kernels.prune_pack import Block, check_block
from semisparse.kernels.prune_pack8 import _store_columns

BLOCK = Block(tile_rows=16, pairs=32, warps=4, registers=116)
"""As prune_pack8's: 64 x 64 entries for each warp, side by side. Left to itself the compiler takes up to 255 registers,
and 4 programs no longer fit on a multiprocessor. Nothing was timed yet."""

_CUT = 20 - sampling.ROUNDING_BITS  # of the bits of fp32's mantissa that e4m3 does not have, those without a random one
_SHIFT = tl.constexpr(_CUT)
_MIDDLE = tl.constexpr(1 << _CUT - 1)
_RANDOM = tl.constexpr((1 << sampling.ROUNDING_BITS) - 1 << _CUT)


@triton.jit
def _load_tiles(start, stride, local_row, local_column, inside, left, IN: tl.constexpr, NATIVE: tl.constexpr):
    """Of each tile 4 x 4 values (fp32), and what its random numbers follow from: 2 words for each row.

    left: rows of dy that lie below the first one of the tile and are there; None if all are.
    """
    HALF: tl.constexpr = tl.bfloat16 if IN == tl.float32 else IN
    WIDTH: tl.constexpr = 2 if IN == tl.float32 else 1  # int64 words that hold one row of a tile
    values, words = (), ()
    for i in tl.static_range(4):
        present = inside
        if left is not None:
            present = inside & (left > i)
        at = start + (4 * local_row + i) * stride + WIDTH * local_column
        line = load_line(at, present, IN, HALF, NATIVE, True)
        values = values + (line[1],)
        if IN == tl.float32:
            for half in tl.static_range(2):
                right = line[1][2 * half + 1].to(tl.uint32, bitcast=True)
                turned = ((right << 16) | (right >> 16)).to(tl.int32, bitcast=True)
                words = words + (line[1][2 * half].to(tl.int32, bitcast=True) ^ turned,)
        else:
            words = words + line[2]
    return values, words


@triton.jit
def _kept_codes(values, word, column: tl.constexpr, multiplier, NATIVE: tl.constexpr):
    """The codes of the two kept entries of a tile's column, the first one's below (int32), and its nibble."""
    a, b, c, d = values[0][column], values[1][column], values[2][column], values[3][column]
    first, second, least = mvue.choose(
        score(a, NATIVE), score(b, NATIVE), score(c, NATIVE), score(d, NATIVE), mvue.uniform(word)
    )
    low = tl.where(first == 0, a, tl.where(first == 1, b, c))
    high = tl.where(second == 1, b, tl.where(second == 2, c, d))
    added = ((word.to(tl.int32, bitcast=True) << _SHIFT) & _RANDOM) | _MIDDLE
    low_size = tl.maximum(tl.abs(low), least) * multiplier
    high_size = tl.maximum(tl.abs(high), least) * multiplier
    code = e4m3.code_at_random(low_size, low.to(tl.int32, bitcast=True), added)
    other = e4m3.code_at_random(high_size, high.to(tl.int32, bitcast=True), added ^ _RANDOM)
    return code | (other << 8), first | (second << 2)


@triton.jit
def _kept(values, drawn, multiplier, NATIVE: tl.constexpr):
    """What _store_columns takes of a row of tiles, and the nibbles of each tile's columns as one number."""
    kept, nibbles = (), 0
    for half in tl.static_range(2):
        even, nibble = _kept_codes(values, drawn[2 * half], 2 * half, multiplier, NATIVE)
        odd, other = _kept_codes(values, drawn[2 * half + 1], 2 * half + 1, multiplier, NATIVE)
        kept = kept + (even | (odd << 16),)
        nibbles = nibbles | ((nibble | (other << 4)) << (8 * half))
    return kept, nibbles


@triton.jit
def _store_rows(out, values, row_words, local_row, local_column, inside, left, multiplier, CONVERTS: tl.constexpr):
    """Store the 4 rows of each tile as words of e4m3; zeros in rows that are not there, where the scale is NaN, too."""
    for i in tl.static_range(4):
        a, b, c, d = values[i][0], values[i][1], values[i][2], values[i][3]
        word = e4m3.pack_four(a * multiplier, b * multiplier, c * multiplier, d * multiplier, CONVERTS)
        if left is not None:
            word = tl.where(left > i, word, 0)
        tl.store(out + (4 * local_row + i) * row_words + local_column, word, mask=inside)


@triton.jit
def _store_sums(sums, of_tiles, columns, TILE_ROWS: tl.constexpr, PAIRS: tl.constexpr):
    """Add up the sums of a block's stacks by column, and store them."""
    pair = tl.arange(0, 8)[:, None, None] + 8 * tl.arange(0, PAIRS // 8)[None, :, None]
    for j in tl.static_range(4):
        by_stack = tl.reshape(of_tiles[j], (8, 4, TILE_ROWS // 16, PAIRS // 8, 2))
        total = tl.sum(tl.sum(by_stack, axis=2), axis=1)
        column = 8 * pair + 4 * tl.arange(0, 2)[None, None, :] + j
        tl.store(sums + column, total, mask=column < columns)


@triton.jit(do_not_specialize=("rows", "stride", "count", "row_blocks", "blocks"))
def sample_pack8(
    gradient, seed, largest, rows8, packed, sums, scale, scale_sample,
    rows, rows_padded, columns, stride, count, row_blocks, blocks,
    IN: tl.constexpr, BITS: tl.constexpr, PADDING: tl.constexpr, TILE_ROWS: tl.constexpr, PAIRS: tl.constexpr,
    EVEN: tl.constexpr, WIDE: tl.constexpr, NATIVE: tl.constexpr, CONVERTS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """The kernel; see launch for the arguments, and prune_pack8 for the way a program goes through its stacks.

    rows8: int32 words. seed, rows8 and sums may be None. stride: 16-byte pieces from row to row.
    """
    down, right = block_at(columns, 8 * PAIRS, WIDE)
    row_words, row_words_t = columns // 4, rows_padded // 16  # 32-bit words of dy in e4m3, 64-bit ones of the sample
    if WIDE:
        stride, blocks = tl.cast(stride, tl.int64), tl.cast(blocks, tl.int64)
        row_words, row_words_t = row_words.to(tl.int64), row_words_t.to(tl.int64)
    stride *= 2  # int64 words
    REST: tl.constexpr = TILE_ROWS * PAIRS // 128
    rest = tl.arange(0, REST)[None, None, :]
    local_stack = tl.arange(0, 4)[None, :, None] + 4 * (rest // (PAIRS // 8))
    local_pair = tl.arange(0, 8)[:, None, None] + 8 * (rest % (PAIRS // 8))
    local_column = 2 * local_pair[:, :, :, None] + tl.arange(0, 2)[None, None, None, :]
    if EVEN:
        inside = tl.full((8, 4, REST), 1, tl.int1)
    else:
        inside = (down * (TILE_ROWS // 4) + local_stack < rows_padded // 16) & (
            right * PAIRS + local_pair < columns // 8
        )
    both_inside = inside[:, :, :, None] & tl.full((1, 1, 1, 2), 1, tl.int1)
    multiplier = e4m3.multiplier_for(e4m3.largest_word(largest, count, WORDS))
    half = multiplier * 0.5
    once = (down == 0) & (right == 0)
    tl.store(scale, e4m3.inverse(multiplier), mask=once)
    tl.store(scale_sample, e4m3.inverse(half), mask=once)
    key = tl.zeros((1, 1, 1, 1), tl.int64)
    if seed is not None:
        key += tl.load(seed)
    first_row = (down * 4 * TILE_ROWS).to(tl.int64)
    WIDTH: tl.constexpr = 2 if IN == tl.float32 else 1
    start = gradient + first_row * stride + right * (2 * PAIRS * WIDTH)
    kept_in_columns, word_columns, of_tiles = (), (), ()
    for row in tl.static_range(4):
        local_row = (4 * local_stack + row)[:, :, :, None]  # of tiles
        tile_row = down * TILE_ROWS + local_row
        left = None
        if not EVEN:
            left = rows - 4 * tile_row
        values, words = _load_tiles(start, stride, local_row, local_column, both_inside, left, IN, NATIVE)
        if rows8 is not None:
            out = rows8 + first_row * row_words + right * (2 * PAIRS)
            _store_rows(out, values, row_words, local_row, local_column, both_inside, left, multiplier, CONVERTS)
        if sums is not None:
            new = ()
            for j in tl.static_range(4):
                total = (values[0][j] + values[1][j]) + (values[2][j] + values[3][j])
                new = new + ((of_tiles[j] + total) if row else total,)
            of_tiles = new
        drawn = mvue.random_words(words, tile_row, right * 2 * PAIRS + local_column, key, NATIVE)
        kept, nibbles = _kept(values, drawn, half, NATIVE)
        kept_in_columns = kept_in_columns + (kept,)
        if not EVEN:
            nibbles = tl.where(both_inside, nibbles, PADDING & 0xFFFF)
        even, odd = tl.split(nibbles)
        word_columns = word_columns + (even | (odd << 16),)
    if sums is not None:
        to = sums + down.to(tl.int64) * columns + right * (8 * PAIRS)
        _store_sums(to, of_tiles, columns - right * (8 * PAIRS), TILE_ROWS, PAIRS)
    out = packed.to(tl.pointer_type(tl.int64)) + (right * 8 * PAIRS).to(tl.int64) * row_words_t
    out += down * (TILE_ROWS // 4)
    _store_columns(out, kept_in_columns, inside, local_pair, local_stack, row_words_t, NATIVE)
    store_stacked_metadata(
        packed, rows_padded.to(tl.int64) * (columns // 2), word_columns, right * 8 * PAIRS, down * TILE_ROWS,
        row_blocks, blocks, BITS, True, TILE_ROWS, PAIRS,
    )  # fmt: skip


def launch(
    grad_output: Tensor,
    seed: Tensor | None,
    largest: Tensor,
    rows8: Tensor | None,
    packed: Tensor,
    sums: Tensor | None,
    scales: tuple[Tensor, Tensor],
    *,
    layout: MetadataLayout,
    block: Block = BLOCK,
) -> Launcher:
    """Write a gradient in e4m3, and the packed sample of its transpose. Asynchronous, on the device's current stream.

    M' is M rounded up to a multiple of 32, with zeros in the padding.

    Args:
        grad_output: dy, M x N, as amax.readable gives it, N a multiple of 32.
        seed: Key of the random numbers, one int64 element on the device; None for the key 0.
        largest: What amax.launch left of dy.
        rows8: M' x N, contiguous, of one-byte elements, for dy itself; None to leave it out.
        packed: Contiguous uint8, long enough for N x M' values at 2:4 and whole metadata blocks.
        sums: fp32, sum_rows(M) x N, for the sums of dy over the rows of each program; None to leave them out.
        scales: Two tensors of one fp32 element, which receive the scale of dy and that of the sample, twice as large.
        layout: Where the metadata goes.
        block: What one program covers: a multiple of 16 rows of tiles and a multiple of 8 pairs.

    Returns:
        What was launched. Its pointers are grad_output, seed, largest, rows8, packed, sums and scales.

    Raises:
        ShapeError: A size or a buffer does not fit.
        TensorError: A dtype or a memory layout does not fit.
        ConfigError: block does not hold whole metadata blocks or whole stacks.
    """
    amax.check_readable(grad_output)
    amax.check_partials(largest, largest.numel())
    if seed is not None and (seed.dtype != torch.int64 or seed.numel() != 1):
        raise TensorError(f"seed is {seed.dtype} {tuple(seed.shape)}; it must be one int64 element")
    for name, tensor in zip(("scale of dy", "scale of the sample"), scales, strict=True):
        if tensor.dtype != torch.float32 or tensor.numel() != 1:
            raise TensorError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}; it must be one float32 element")
    (rows, columns), index = grad_output.shape, grad_output.get_device()
    sizes = rows, columns, grad_output.stride(0) * grad_output.itemsize // ALIGNMENT, largest.numel()
    given = seed is not None, rows8 is not None, sums is not None
    start, padded = _prepare(sizes, grad_output.dtype, layout, block, given, index)
    check_buffer("packed", packed, columns, padded, layout, FP8.itemsize)
    if rows8 is not None and (rows8.itemsize != 1 or rows8.shape != (padded, columns) or not rows8.is_contiguous()):
        raise ShapeError(
            f"rows8 is {rows8.dtype} {tuple(rows8.shape)}; it must be {(padded, columns)}, contiguous, in bytes"
        )
    if sums is not None and (sums.shape != (wanted := (sum_rows(rows, block), columns)) or not sums.is_contiguous()):
        raise ShapeError(f"sums has shape {tuple(sums.shape)}; it must be contiguous and {wanted}")
    words = None if rows8 is None else rows8.view(torch.int32)
    start(index, grad_output.view(torch.int64), seed, largest, words, packed, sums, *scales)
    return start


def sum_rows(rows: int, block: Block = BLOCK) -> int:
    """Rows of sums for a gradient of so many rows: one for each row of programs."""
    return -(-rows // (4 * block.tile_rows))


@lru_cache(4096)
def _prepare(
    sizes: tuple[int, int, int, int],
    dtype: torch.dtype,
    layout: MetadataLayout,
    block: Block,
    given: tuple[bool, bool, bool],
    index: int,
) -> tuple[Launcher, int]:
    """All of a launch that does not change while shapes repeat, and the rows with padding.

    Args:
        sizes: Rows, columns, 16-byte pieces from row to row, elements of largest.
        dtype: Of the gradient.
        layout: As launch's.
        block: As launch's.
        given: Whether seed, rows8 and sums are. Only a key: the kernel is compiled for it.
        index: Of the CUDA device; -1 is the CPU's interpreter.
    """
    rows, columns, stride, count = sizes
    padded = -(-rows // SPARSE_MULTIPLE_8BIT) * SPARSE_MULTIPLE_8BIT
    if columns % SPARSE_MULTIPLE_8BIT:
        raise ShapeError(f"grad_output is {rows} x {columns}; columns must be a multiple of {SPARSE_MULTIPLE_8BIT}")
    check_block(block, layout, transpose_only=True)
    if block.tile_rows % 16 or block.pairs % 8:
        raise ConfigError(f"a program of {block} does not hold whole stacks of a warp: 16 rows of tiles x 8 pairs")
    height, width = 4 * block.tile_rows, 8 * block.pairs
    even = rows == padded and not (rows % height or columns % width)
    span = max(height * 2 * stride, width * padded // 16)
    grid, wide = grid_of(padded, columns, height, width, flat=span >= INT32_END)
    launcher = Launcher(
        sample_pack8,
        grid,
        (rows, padded, columns, stride, count, *layout.blocks(columns, padded)),
        (
            amax.TYPES[dtype],
            layout.bits,
            repeated(layout.padding),
            block.tile_rows,
            block.pairs,
            even,
            wide,
            index >= 0,
            e4m3.native_on(index),
            amax.words_for(count),
        ),
        num_warps=block.warps,
        maxnreg=None if wide else block.registers,
    )
    return launcher, padded
