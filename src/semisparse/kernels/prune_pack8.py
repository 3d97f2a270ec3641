"""prune_pack for fp8: choose what each 4x4 tile keeps, round to e4m3, write the packed matrix, its transpose, or both.

Of the 8-bit values of a tile pair (4 rows x 8 columns), a row fills one word of the packed matrix, but a column only
half a word of the transpose. Therefore a thread holds a *stack*: four tile pairs below each other, 16 rows x 8 columns.
It goes through them one after the other, stores their rows, and keeps what is left of their columns until it has 8
bytes of each. A warp holds 8 x 4 stacks, 64 x 64 entries: every store fills whole 32-byte sectors, in both directions,
and the words of one metadata block (packed_metadata.py) change places within the warp.
"""

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from semisparse import masks
from semisparse.errors import ConfigError, TensorError
from semisparse.formats.layout import ALIGNMENT, FP8, MetadataLayout
from semisparse.kernels import e4m3, tile_masks
from semisparse.kernels.amax import readable, words_for
from semisparse.kernels.grid import INT32_END, block_at, grid_of
from semisparse.kernels.launch_checks import check_buffers, check_choice, check_held, check_sizes, check_written
from semisparse.kernels.launcher import Launcher
from semisparse.kernels.packed_metadata import repeated, store_stacked_metadata
from semisparse.kernels.packed_values import load_line, permute_bytes
from semisparse.kernels.prune_pack import BLOCK_COUNTS, Block, check_block
from semisparse.masks import GIVEN_CODES

BLOCK = Block(tile_rows=16, pairs=32, warps=4, registers=None)
"""64 x 64 entries for each warp, side by side: 75 % of copy rate at 11008 x 4096 in bf16, 96 % in fp32, where the 18
other blocks and limits on registers reach 77 % and 97 % at best (one NVIDIA H100)."""

_GIVEN_CODES = tl.constexpr(GIVEN_CODES)
_TRANSPOSABLE = tl.constexpr(masks.get("transposable").constant)
_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit
def _load_tiles(
    start, stride, local_row, local_column, inside, multiplier,
    IN: tl.constexpr, NATIVE: tl.constexpr, CONVERTS: tl.constexpr,
):  # fmt: skip
    """The 16 scores of each tile, and its 4 rows as words of e4m3."""
    # The 16-bit words that load_line makes are not used, and the compiler leaves them out.
    HALF: tl.constexpr = tl.bfloat16 if IN == tl.float32 else IN
    WIDTH: tl.constexpr = 2 if IN == tl.float32 else 1  # int64 words that hold one row of a tile
    scores, words = (), ()
    for i in tl.static_range(4):
        at = start + (4 * local_row + i) * stride + WIDTH * local_column
        line = load_line(at, inside, IN, HALF, NATIVE, True)
        scores = scores + line[0]
        a, b, c, d = line[1]
        word = e4m3.pack_four(a * multiplier, b * multiplier, c * multiplier, d * multiplier, CONVERTS)
        words = words + (word,)
    return scores, words


@triton.jit
def _byte_selectors(nibbles):
    """What permute_bytes needs to pick the two kept bytes of four: one byte for each even group, one for each odd."""
    even = (nibbles & 0x03030303) | ((nibbles << 2) & 0x30303030)
    odd = ((nibbles >> 4) & 0x03030303) | ((nibbles >> 2) & 0x30303030)
    return even, odd


@triton.jit
def _kept_in_rows(words, selectors, NATIVE: tl.constexpr):
    """For each of the 4 rows of a tile pair its kept bytes, two of each tile, as one word."""
    kept = ()
    for i in tl.static_range(4):
        left, right = tl.split(selectors[i % 2])
        pair = permute_bytes(left, right | 0x44444444, i // 2 * 0x11 + 0x40, NATIVE)
        left, right = tl.split(words[i])
        kept = kept + (permute_bytes(left, right, pair, NATIVE),)
    return kept


@triton.jit
def _kept_in_columns(words, selectors, NATIVE: tl.constexpr):
    """The kept bytes of columns 0 and 1 of a tile, two of each, as one word, and those of columns 2 and 3."""
    # Bytes of rows 0 and 1, then of rows 2 and 3: those of one column in the lower halves, of the next in the upper.
    even = selectors[0] + (selectors[0] & 0x22222222)
    odd = selectors[1] + (selectors[1] & 0x22222222) + 0x22222222
    kept = ()
    for half in tl.static_range(2):
        halves = 0x7362 if half else 0x5140
        upper = permute_bytes(words[0], words[1], halves, NATIVE)
        lower = permute_bytes(words[2], words[3], halves, NATIVE)
        selector = permute_bytes(even, odd, 0x73 if half else 0x62, NATIVE)
        kept = kept + (permute_bytes(upper, lower, selector, NATIVE),)
    return kept


@triton.jit
def _store_columns(out, kept, inside, local_pair, local_stack, row_words, NATIVE: tl.constexpr):
    """Store 8 bytes of each of the 8 columns of stacks; kept: _kept_in_columns of their four tile rows.

    out: int64 pointer; row_words: int64 words in a packed row of the transpose.
    """
    for j in tl.static_range(4):
        halves = 0x7632 if j % 2 else 0x5410
        first = tl.split(permute_bytes(kept[0][j // 2], kept[1][j // 2], halves, NATIVE))
        second = tl.split(permute_bytes(kept[2][j // 2], kept[3][j // 2], halves, NATIVE))
        for odd in tl.static_range(2):
            low = first[odd].to(tl.uint32, bitcast=True).to(tl.uint64)
            high = second[odd].to(tl.uint32, bitcast=True).to(tl.uint64)
            at = tl.max_contiguous((8 * local_pair + 4 * odd + j) * row_words + local_stack, (1, 1, 1))
            tl.store(out + at, (low | (high << 32)).to(tl.int64, bitcast=True), mask=inside)


@triton.jit
def pack_block8(
    matrix, codes, multiplier, packed, packed_t, rows, columns, stride,
    row_blocks, blocks, row_blocks_t, blocks_t, down, right,
    IN: tl.constexpr, MASK: tl.constexpr, BITS: tl.constexpr, PADDING: tl.constexpr,
    TILE_ROWS: tl.constexpr, PAIRS: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr,
    NATIVE: tl.constexpr, CONVERTS: tl.constexpr,
):  # fmt: skip
    """Pack the block in row `down` and column `right` of blocks.

    multiplier: of the matrix, fp32. stride: int64 words from row to row. All else is prune_pack8's.
    """
    row_words, row_words_t = columns // 8, rows // 16  # in a packed row: 32-bit words of two tiles, 64-bit ones of four
    if WIDE:
        blocks, blocks_t = tl.cast(blocks, tl.int64), tl.cast(blocks_t, tl.int64)
        row_words, row_words_t = row_words.to(tl.int64), row_words_t.to(tl.int64)
    REST: tl.constexpr = TILE_ROWS * PAIRS // 128
    rest = tl.arange(0, REST)[None, None, :]
    # Triton deals out lanes along the first axis with room.
    local_stack = tl.arange(0, 4)[None, :, None] + 4 * (rest // (PAIRS // 8))
    local_pair = tl.arange(0, 8)[:, None, None] + 8 * (rest % (PAIRS // 8))
    local_column = 2 * local_pair[:, :, :, None] + tl.arange(0, 2)[None, None, None, :]
    if EVEN:
        inside = tl.full((8, 4, REST), 1, tl.int1)
    else:
        inside = (down * (TILE_ROWS // 4) + local_stack < rows // 16) & (right * PAIRS + local_pair < columns // 8)
    both_inside = inside[:, :, :, None] & tl.full((1, 1, 1, 2), 1, tl.int1)
    first_row = (down * 4 * TILE_ROWS).to(tl.int64)
    WIDTH: tl.constexpr = 2 if IN == tl.float32 else 1
    start = matrix + first_row * stride + right * (2 * PAIRS * WIDTH)
    kept_in_columns, word_rows, word_columns = (), (), ()
    for row in tl.static_range(4):
        local_row = 4 * local_stack + row  # of tiles
        scores, words = _load_tiles(
            start, stride, local_row[:, :, :, None], local_column, both_inside, multiplier, IN, NATIVE, CONVERTS
        )
        if MASK == _TRANSPOSABLE:
            choice = tile_masks.best_tile(scores)
        elif MASK == _GIVEN_CODES:
            tile_row = (down * TILE_ROWS + local_row[:, :, :, None]).to(tl.int64)
            at = codes + tile_row * (columns // 4) + right * 2 * PAIRS + local_column
            choice = tile_masks.both_codes(tl.load(at, mask=both_inside, other=tile_masks.ZERO_TILE))
        else:
            choice = tile_masks.best_rows(scores)
        nibbles = tile_masks.metadata_nibbles(choice)
        selectors = _byte_selectors(nibbles)
        if packed is not None:
            out = packed.to(tl.pointer_type(tl.int32)) + first_row * row_words + right * PAIRS
            kept = _kept_in_rows(words, selectors, NATIVE)
            for i in tl.static_range(4):
                at = tl.max_contiguous((4 * local_row + i) * row_words + local_pair, (1, 1, 1))
                tl.store(out + at, kept[i], mask=inside)
        if packed_t is not None:
            kept_in_columns = kept_in_columns + (_kept_in_columns(words, selectors, NATIVE),)
        if not EVEN:
            nibbles = tl.where(both_inside, nibbles, PADDING)
        even, odd = tl.split(nibbles)
        word_rows = word_rows + ((even & 0xFFFF) | (odd << 16),)
        word_columns = word_columns + (((even >> 16) & 0xFFFF) | (odd & -0x10000),)
    values_bytes = rows.to(tl.int64) * (columns // 2)
    line, group = down * 4 * TILE_ROWS, right * 2 * PAIRS
    if packed is not None:
        store_stacked_metadata(
            packed, values_bytes, word_rows, line, group, row_blocks, blocks, BITS, False, TILE_ROWS, PAIRS
        )
    if packed_t is not None:
        out = packed_t.to(tl.pointer_type(tl.int64)) + (right * 8 * PAIRS).to(tl.int64) * row_words_t
        out += down * (TILE_ROWS // 4)
        _store_columns(out, kept_in_columns, inside, local_pair, local_stack, row_words_t, NATIVE)
        line, group = right * 8 * PAIRS, down * TILE_ROWS
        store_stacked_metadata(
            packed_t, values_bytes, word_columns, line, group, row_blocks_t, blocks_t, BITS, True, TILE_ROWS, PAIRS
        )


@triton.jit(do_not_specialize=("stride", "count", *BLOCK_COUNTS))
def prune_pack8(
    matrix, codes, largest, scale, packed, packed_t, rows, columns, stride, count,
    row_blocks, blocks, row_blocks_t, blocks_t,
    IN: tl.constexpr, MASK: tl.constexpr, BITS: tl.constexpr, PADDING: tl.constexpr,
    TILE_ROWS: tl.constexpr, PAIRS: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr,
    NATIVE: tl.constexpr, CONVERTS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """The kernel; see launch for the arguments, of which codes, scale, packed and packed_t may be None.

    stride: 16-byte pieces from row to row, so that Triton knows rows to be aligned. count: elements of largest, at most
    WORDS, a power of two. EVEN and WIDE: as prune_pack's. CONVERTS: the GPU has an instruction that converts to e4m3.
    """
    down, right = block_at(columns, 8 * PAIRS, WIDE)
    multiplier = e4m3.multiplier_for(tl.load(largest) if WORDS == 1 else e4m3.largest_word(largest, count, WORDS))
    if scale is not None:
        tl.store(scale, e4m3.inverse(multiplier), mask=(down == 0) & (right == 0))
    if WIDE:
        stride = tl.cast(stride, tl.int64)
    pack_block8(
        matrix, codes, multiplier, packed, packed_t, rows, columns, stride * 2,
        row_blocks, blocks, row_blocks_t, blocks_t, down, right,
        IN, MASK, BITS, PADDING, TILE_ROWS, PAIRS, EVEN, WIDE, NATIVE, CONVERTS,
    )  # fmt: skip


def launch(
    matrix: Tensor,
    largest: Tensor,
    packed: Tensor | None,
    packed_t: Tensor | None,
    *,
    layout: MetadataLayout,
    mask: str = "transposable",
    codes: Tensor | None = None,
    scale: Tensor | None = None,
    block: Block = BLOCK,
) -> Launcher:
    """Prune a matrix, round what is kept to e4m3, and write it, its transpose, or both, in packed form.

    The mask is chosen on the matrix as it is. What is kept is multiplied by fp8.multiplier_for(largest) and rounded as
    reference/fp8.py says, bit for bit. If largest is not finite, the multiplier is NaN and every kept value is NaN.
    Asynchronous, on the device's current stream.

    Args:
        matrix: R x C, multiples of 32, fp32, fp16 or bf16. Rows are read in 16-byte pieces; a matrix whose rows are not
            contiguous and aligned for that is copied first.
        largest: The largest magnitude that scales the matrix, as the bits of an fp32 number: int32, contiguous, on the
            device; of several elements the maximum.
        packed: Contiguous uint8, long enough for the values (R x C / 2 bytes) and whole metadata blocks; None to write
            the transpose alone.
        packed_t: The same for the transpose; None to leave it out, as for masks that are 2:4 along the columns only.
        layout: Where the metadata goes.
        mask: "transposable" or "row", one of masks.MASKS that takes no scale and is chosen while packing.
        codes: As prune_pack.launch's.
        scale: One fp32 element on the device, for what packed values must be multiplied by: 1 / multiplier. None to
            leave it out.
        block: What one program covers: a multiple of 16 rows of tiles and a multiple of 8 pairs.

    Returns:
        What was launched. Its pointers are matrix, codes, largest, scale, packed and packed_t.

    Raises:
        ShapeError: A size or a buffer does not fit.
        TensorError: A dtype or a memory layout does not fit.
        ConfigError: The mask is unknown or not chosen by this kernel, mask or block cannot be used with the other
            arguments, or packed and packed_t are both None.
    """
    rows, columns = matrix.shape
    matrix = readable(matrix)
    if largest.dtype != torch.int32 or not largest.is_contiguous() or not largest.numel():
        raise TensorError(f"largest is {largest.dtype} {tuple(largest.shape)}; it must be contiguous int32, not empty")
    check_held(codes, scale, rows, columns)
    index, pieces = matrix.get_device(), matrix.stride(0) * matrix.itemsize // ALIGNMENT
    sizes = rows, columns, pieces, largest.numel()
    given, written = (codes is not None, scale is not None), (packed is not None, packed_t is not None)
    start = _prepare(sizes, matrix.dtype, mask, given, written, layout, block, index)
    check_buffers(packed, packed_t, rows, columns, layout, FP8.itemsize)
    start(index, matrix.view(torch.int64), codes, largest, scale, packed, packed_t)
    return start


@lru_cache(4096)
def _prepare(
    sizes: tuple[int, int, int, int],
    dtype: torch.dtype,
    mask: str,
    given: tuple[bool, bool],
    written: tuple[bool, bool],
    layout: MetadataLayout,
    block: Block,
    index: int,
) -> Launcher:
    """All of a launch that does not change while shapes repeat, checked once.

    Args:
        sizes: Rows, columns, 16-byte pieces from row to row, elements of largest.
        dtype: Of the matrix.
        mask: The name of the mask.
        given: Whether tile codes are given, and a scale is wanted.
        written: Whether the matrix is written, and its transpose.
        layout: Where the metadata goes.
        block: What one program covers.
        index: Of the CUDA device; -1 is the CPU's interpreter.
    """
    rows, columns, stride, count = sizes
    chosen = masks.get(mask)
    check_written(*written)
    if chosen.needs_scale:
        raise ConfigError(f"mask={mask!r} is not packed as e4m3; use 'transposable' or 'row'")
    check_choice(chosen, given[0], False)
    check_sizes(rows, rows, columns, (dtype, FP8), chosen, written[1], (FP8,))
    check_block8(block, layout, transpose_only=not written[0])
    height, width = 4 * block.tile_rows, 8 * block.pairs
    span = height * max(2 * stride, columns // 8)  # as prune_pack's
    grid, wide = grid_of(rows, columns, height, width, flat=span >= INT32_END)
    return Launcher(
        prune_pack8,
        grid,
        (*sizes, *layout.blocks(rows, columns), *layout.blocks(columns, rows)),
        (
            *constants_of8(dtype, chosen, given[0], layout, block, not (rows % height or columns % width), wide, index),
            words_for(count),
        ),
        num_warps=block.warps,
        maxnreg=None if wide else block.registers,
    )


def check_block8(block: Block, layout: MetadataLayout, *, transpose_only: bool = False) -> None:
    """Raise ConfigError unless a program of this size can write blocks of layout; arguments as check_block's."""
    check_block(block, layout, transpose_only=transpose_only)
    if block.tile_rows % 16 or block.pairs % 8:
        raise ConfigError(f"a program of {block} does not hold whole stacks of a warp: 16 rows of tiles x 8 pairs")


def constants_of8(
    dtype: torch.dtype,
    mask: masks.Mask,
    given_codes: bool,
    layout: MetadataLayout,
    block: Block,
    even: bool,
    wide: bool,
    index: int,
) -> tuple[Any, ...]:
    """Constants of pack_block8, in order.

    Args:
        dtype: Of the matrix.
        mask: What is chosen.
        given_codes: Whether tile codes are given instead.
        layout: Where the metadata goes.
        block: What one program covers.
        even: Whether all programs lie inside of their matrices.
        wide: Whether offsets within a program need 64 bits.
        index: Of the CUDA device; -1 is the CPU's interpreter.
    """
    return (
        _TYPES[dtype],
        GIVEN_CODES if given_codes else mask.constant,
        layout.bits,
        repeated(layout.padding),
        block.tile_rows,
        block.pairs,
        even,
        wide,
        index >= 0,
        e4m3.native_on(index),
    )
