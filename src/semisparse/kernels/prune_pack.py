"""One pass over a matrix: choose what each 4x4 tile keeps, write the packed matrix, the packed transpose, or both.

A program handles a block of tiles that covers whole metadata blocks in both directions, so it alone writes all of
their bytes, padding included. A thread holds tile *pairs* (4 rows x 8 columns, 16 bytes per row of 16-bit values). This
makes loads wide and fills a 32-bit word of metadata for each direction. Memory bound by design: values move as words
(packed_values.py), the best tile costs about 220 operations (tile_masks.py), metadata takes a few shuffles
(packed_metadata.py).
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from semisparse import masks
from semisparse.errors import ConfigError
from semisparse.formats.layout import ALIGNMENT, LARGEST_BLOCK, MetadataLayout
from semisparse.kernels import packed_values, tile_masks
from semisparse.kernels.grid import INT32_END, block_at, grid_of
from semisparse.kernels.launch_checks import check_buffers, check_choice, check_held, check_sizes, check_written
from semisparse.kernels.launcher import Launcher
from semisparse.kernels.packed_metadata import repeated, store_metadata
from semisparse.pattern import GROUP

_GIVEN_CODES = tl.constexpr(masks.GIVEN_CODES)
_TRANSPOSABLE = tl.constexpr(masks.get("transposable").constant)
_SOFT = tl.constexpr(masks.get("soft").constant)


class Block(NamedTuple):
    """What one program of the kernel covers.

    Attributes:
        tile_rows: Rows of tiles, a multiple of 8.
        pairs: Tile pairs per row of tiles, a multiple of 4.
        warps: Warps per program.
        registers: Most registers per thread; None leaves it to the compiler.
    """

    tile_rows: int
    pairs: int
    warps: int = 4
    registers: int | None = 120


DEFAULT_BLOCK = Block(tile_rows=LARGEST_BLOCK[0] // GROUP, pairs=LARGEST_BLOCK[1] // 2)
"""The fewest registers with which no variant spills on sm80, sm90 or sm100."""

HOPPER_BLOCK = Block(tile_rows=16, pairs=16, warps=8, registers=80)
"""For 16-bit matrices on sm90. Chosen by timing on one H200; no result file is kept. Where Triton knows that rows are
aligned, two bf16 variants spill registers with it (tests/kernels/test_compile.py)."""

_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


PACKED_AT, PACKED_T_AT = tl.constexpr(3), tl.constexpr(4)
"""Words of a table's entry that say where the buffers lie, in units of 16 bytes from the entry."""


@triton.jit
def _buffer(given, AT: tl.constexpr, TABLED: tl.constexpr, NATIVE: tl.constexpr):
    """A buffer's address: as given, or from the table's entry that is given."""
    if TABLED:
        if NATIVE:
            # A plain load would be moved to the start of the program, and a volatile one pass the L1 cache by, where
            # the entry lies: at full bandwidth, that takes microseconds.
            place = tl.inline_asm_elementwise(
                "ld.global.ca.b64 $0, [$1];", "=l,l", [(given + AT).to(tl.int64)], tl.int64, False, 1
            )
        else:
            place = tl.load(given + AT)
        given = given.to(tl.pointer_type(tl.uint8)) + place * 16
    return given


@triton.jit
def pack_block(
    matrix, codes, scale, packed, packed_t, rows, rows_padded, columns, stride,
    row_blocks, blocks, row_blocks_t, blocks_t, down, right,
    IN: tl.constexpr, OUT: tl.constexpr, MASK: tl.constexpr, TRANSPOSED: tl.constexpr, BITS: tl.constexpr,
    PADDING: tl.constexpr, TILE_ROWS: tl.constexpr, PAIRS: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr,
    NATIVE: tl.constexpr, TABLED: tl.constexpr,
):  # fmt: skip
    """prune_pack for one block of a matrix, that in row `down` and column `right` of blocks.

    Where packed is None, the transpose alone is written.

    TABLED: packed and packed_t are both the entry of a table (prune_pack_many.py) that says where the buffers lie. The
    entry is read where they are written, so that their addresses hold no registers until then.
    """
    row_words, row_words_t = columns // 4, rows_padded // 4  # 32-bit words in a packed row
    if WIDE:
        stride, blocks, blocks_t = tl.cast(stride, tl.int64), tl.cast(blocks, tl.int64), tl.cast(blocks_t, tl.int64)
        row_words, row_words_t = row_words.to(tl.int64), row_words_t.to(tl.int64)
    # A warp holds 8 tile rows x 4 pairs: every load and store then fills whole 32-byte sectors, in both directions.
    # Triton deals out lanes along the first axis with room, so that axis is the pairs.
    rest = tl.arange(0, TILE_ROWS * PAIRS // 32)[None, None, :, None]
    local_row = tl.arange(0, 8)[None, :, None, None] + 8 * (rest // (PAIRS // 4))
    local_pair = tl.arange(0, 4)[:, None, None, None] + 4 * (rest % (PAIRS // 4))
    local_column = 2 * local_pair + tl.arange(0, 2)[None, None, None, :]
    tile_row = down * TILE_ROWS + local_row
    tile_column = right * 2 * PAIRS + local_column
    inside = (tile_row < row_words_t) & (tile_column < row_words)
    if EVEN:
        inside = tl.full((4, 8, TILE_ROWS * PAIRS // 32, 2), 1, tl.int1)
    WIDTH: tl.constexpr = 2 if IN == tl.float32 else 1  # int64 words that hold one row of a tile
    first_row = (down * 4 * TILE_ROWS).to(tl.int64)
    start = matrix + first_row * stride + right * (2 * PAIRS * WIDTH)
    scores, values, kept_words = (), (), ()
    for i in tl.static_range(4):
        present = inside
        if not EVEN:
            present = inside & (4 * tile_row + i < rows)
        line = packed_values.load_line(
            start + (4 * local_row + i) * stride + WIDTH * local_column, present, IN, OUT, NATIVE, MASK == _SOFT
        )
        scores, values, kept_words = scores + line[0], values + line[1], kept_words + line[2]
    if MASK == _TRANSPOSABLE:
        choice = tile_masks.best_tile(scores)
    elif MASK == _GIVEN_CODES:
        at = codes + tile_row.to(tl.int64) * row_words + tile_column
        choice = tile_masks.both_codes(tl.load(at, mask=inside, other=tile_masks.ZERO_TILE))
    else:
        choice = tile_masks.best_rows(scores)
    if MASK == _SOFT:
        soft = tile_masks.shrink(values, scores, choice, tl.load(scale))
        kept_words = ()
        for k in tl.static_range(8):
            kept_words = kept_words + (packed_values.pack_word(soft[2 * k], soft[2 * k + 1], OUT, NATIVE),)

    nibbles = tile_masks.metadata_nibbles(choice)
    selectors = packed_values.byte_selectors(nibbles)
    if packed is not None:
        out = (
            _buffer(packed, PACKED_AT, TABLED, NATIVE).to(tl.pointer_type(tl.int32))
            + first_row * row_words
            + right * (2 * PAIRS)
        )
        kept = packed_values.kept_in_rows(kept_words, selectors, NATIVE)
        for i in tl.static_range(4):
            at = out + (4 * local_row + i) * row_words + local_column
            tl.store(at, kept[i], mask=inside)
    if TRANSPOSED:
        out = _buffer(packed_t, PACKED_T_AT, TABLED, NATIVE).to(tl.pointer_type(tl.int32))
        out += (right * 8 * PAIRS).to(tl.int64) * row_words_t
        out += down * TILE_ROWS
        kept = packed_values.kept_in_columns(kept_words, selectors, NATIVE)
        packed_values.store_columns(out, kept, inside, local_pair, local_row, row_words_t, TILE_ROWS * PAIRS // 32)

    if not EVEN:
        nibbles = tl.where(inside, nibbles, PADDING)
    even, odd = tl.split(nibbles)
    values_bytes = rows_padded.to(tl.int64) * columns
    if packed is not None:
        line, group = down * 4 * TILE_ROWS, right * 2 * PAIRS
        word = (even & 0xFFFF) | (odd << 16)
        to = _buffer(packed, PACKED_AT, TABLED, NATIVE)
        store_metadata(to, values_bytes, word, line, group, row_blocks, blocks, BITS, False, TILE_ROWS, PAIRS)
    if TRANSPOSED:
        word = ((even >> 16) & 0xFFFF) | (odd & -0x10000)
        line, group = right * 8 * PAIRS, down * TILE_ROWS
        to = _buffer(packed_t, PACKED_T_AT, TABLED, NATIVE)
        store_metadata(to, values_bytes, word, line, group, row_blocks_t, blocks_t, BITS, True, TILE_ROWS, PAIRS)


BLOCK_COUNTS = ("row_blocks", "blocks", "row_blocks_t", "blocks_t")
"""No address follows from these arguments, so Triton need not compile a variant for 1 and one for multiples of 16."""


@triton.jit(do_not_specialize=("rows", *BLOCK_COUNTS))
def prune_pack(
    matrix, codes, scale, packed, packed_t, rows, rows_padded, columns, stride,
    row_blocks, blocks, row_blocks_t, blocks_t,
    IN: tl.constexpr, OUT: tl.constexpr, MASK: tl.constexpr, TRANSPOSED: tl.constexpr, BITS: tl.constexpr,
    PADDING: tl.constexpr, TILE_ROWS: tl.constexpr, PAIRS: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr,
    NATIVE: tl.constexpr,
):  # fmt: skip
    """The kernel; see launch for the arguments.

    stride: int64 words from row to row. EVEN: every program lies inside the matrix. WIDE: the grid is flat, and offsets
    within a program may need 64 bits as well.
    """
    down, right = block_at(columns, 8 * PAIRS, WIDE)
    pack_block(
        matrix, codes, scale, packed, packed_t, rows, rows_padded, columns, stride,
        row_blocks, blocks, row_blocks_t, blocks_t, down, right,
        IN, OUT, MASK, TRANSPOSED, BITS, PADDING, TILE_ROWS, PAIRS, EVEN, WIDE, NATIVE, False,
    )  # fmt: skip


def launch(
    matrix: Tensor,
    packed: Tensor | None,
    packed_t: Tensor | None,
    *,
    dtype: torch.dtype,
    layout: MetadataLayout,
    mask: str = "transposable",
    rows_padded: int | None = None,
    codes: Tensor | None = None,
    scale: Tensor | None = None,
    block: Block | None = None,
) -> Launcher:
    """Prune a matrix and write it, its transpose, or both, in packed form.

    Asynchronous, on the device's current stream.

    Args:
        matrix: R x C, fp32, fp16 or bf16, C a multiple of 16. Rows are read in 16-byte pieces; a matrix whose rows are
            not contiguous and aligned for that is copied first.
        packed: Contiguous uint8, long enough for the values and whole metadata blocks; None to write the transpose
            alone.
        packed_t: The same for the transpose; None to leave it out, as for masks that are 2:4 along the columns only.
        dtype: Of the packed values, fp16 or bf16. Values are rounded to it once, after the choice.
        layout: Where the metadata goes.
        mask: One of masks.MASKS that is chosen while packing, bit for bit as its choose. "soft" then shrinks the two
            kept of each row by the larger of the others and multiplies by scale, in fp32.
        rows_padded: Zero rows are added up to this multiple of 16; default R.
        codes: Tile codes to take instead of choosing a mask: int16, R/4 x C/4, contiguous; bit 4 * i + j keeps entry
            (i, j) of a tile.
        scale: For mask "soft": one fp32 element on the device.
        block: What one program covers; None takes what is fastest for the device and dtype.

    Returns:
        What was launched. Its pointers are matrix, codes, scale, packed and packed_t.

    Raises:
        ShapeError: A size or a buffer does not fit.
        TensorError: A dtype or a memory layout does not fit.
        ConfigError: The mask is unknown or not chosen by this kernel, mask or block cannot be used with the other
            arguments, or packed and packed_t are both None.
    """
    rows, columns = matrix.shape
    if matrix.stride(1) != 1 or matrix.stride(0) * matrix.itemsize % ALIGNMENT or matrix.data_ptr() % ALIGNMENT:
        matrix = matrix.clone(memory_format=torch.contiguous_format)
    rows_padded = rows if rows_padded is None else rows_padded
    given = codes is not None, scale is not None
    if any(given):
        check_held(codes, scale, rows_padded, columns)
    words_apart = matrix.stride(0) * matrix.itemsize // 8
    types, written, index = (matrix.dtype, dtype), (packed is not None, packed_t is not None), matrix.get_device()
    block = block or best_block(matrix.dtype, index)
    sizes = rows, rows_padded, columns, words_apart
    start, needed = _prepare(sizes, types, mask, given, written, layout, block, native=index >= 0)
    if (packed is not None and packed.numel() < needed[0]) or (packed_t is not None and packed_t.numel() < needed[1]):
        check_buffers(packed, packed_t, rows_padded, columns, layout)
    start(index, matrix.view(torch.int64), codes, scale, packed, packed_t)
    return start


def check_block(block: Block, layout: MetadataLayout, *, transpose_only: bool = False) -> None:
    """Raise ConfigError unless a program covers whole metadata blocks, of the matrix and of its transpose."""
    lines, span = layout.block_rows, layout.block_groups
    turned = 2 * GROUP * block.pairs % lines or block.tile_rows % span
    if turned or (not transpose_only and (GROUP * block.tile_rows % lines or 2 * block.pairs % span)):
        raise ConfigError(f"a program of {block} does not hold whole metadata blocks of {lines} rows x {span} groups")


@lru_cache
def best_block(dtype: torch.dtype, index: int) -> Block:
    """The block for matrices of dtype on device index; -1 is the CPU's interpreter."""
    hopper = index >= 0 and torch.cuda.get_device_capability(index)[0] == 9
    return HOPPER_BLOCK if hopper and dtype.itemsize == 2 else DEFAULT_BLOCK


@lru_cache(4096)
def _prepare(
    sizes: tuple[int, int, int, int],
    types: tuple[torch.dtype, torch.dtype],
    mask: str,
    given: tuple[bool, bool],
    written: tuple[bool, bool],
    layout: MetadataLayout,
    block: Block,
    native: bool,
) -> tuple[Launcher, tuple[int, int]]:
    """All of a launch that does not change while shapes repeat, checked once, and the bytes of the two buffers.

    Args:
        sizes: Rows, rows with padding, columns, int64 words from row to row.
        types: Dtypes read and written.
        mask: The name of the mask.
        given: Whether tile codes are given, and a scale.
        written: Whether the matrix is written, and its transpose.
        layout: Where the metadata goes.
        block: What one program covers.
        native: Whether PTX may be used; the interpreter knows none.
    """
    rows, rows_padded, columns, stride = sizes
    chosen = masks.get(mask)
    check_written(*written)
    check_choice(chosen, *given)
    check_sizes(rows, rows_padded, columns, types, chosen, written[1])
    check_block(block, layout, transpose_only=not written[0])
    row_blocks, blocks = layout.blocks(rows_padded, columns)
    row_blocks_t, blocks_t = layout.blocks(columns, rows_padded)
    height, width = 4 * block.tile_rows, 8 * block.pairs
    even = rows == rows_padded and not (columns % width or rows % height)
    # How far a program's last row lies behind its first, read and written. The lines of the transpose can only lie that
    # far apart where there are so many rows that the grid is flat anyway.
    span = height * max(stride, columns // 4)
    grid, wide = grid_of(rows_padded, columns, height, width, flat=span >= INT32_END)
    launcher = Launcher(
        prune_pack,
        grid,
        (*sizes, row_blocks, blocks, row_blocks_t, blocks_t),
        constants_of(types, chosen, given[0], written[1], layout, block, even, wide, native),
        num_warps=block.warps,
        maxnreg=None if wide else block.registers,
    )
    return launcher, (layout.buffer_bytes(rows_padded, columns), layout.buffer_bytes(columns, rows_padded))


def constants_of(
    types: tuple[torch.dtype, torch.dtype],
    mask: masks.Mask,
    given_codes: bool,
    transposed: bool,
    layout: MetadataLayout,
    block: Block,
    even: bool,
    wide: bool,
    native: bool,
) -> tuple[object, ...]:
    """The compile-time constants of pack_block, in order."""
    return (
        *(_TYPES[dtype] for dtype in types),
        masks.GIVEN_CODES if given_codes else mask.constant,
        transposed,
        layout.bits,
        repeated(layout.padding),
        block.tile_rows,
        block.pairs,
        even,
        wide,
        native,
    )
