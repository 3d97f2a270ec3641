"""One pass over a matrix: choose what each 4x4 tile keeps, write the packed matrix and the packed transpose.

A program handles a block of tiles that covers whole metadata blocks in both directions, so it alone writes all of
their bytes, padding included. A thread holds tile *pairs* (4 rows x 8 columns, 16 bytes a row of 16-bit values), which
makes loads wide and fills a 32-bit word of metadata for each direction. Memory bound by design: the values are moved as
words (words.py), the best tile costs about 220 operations (tiles.py), metadata takes a few shuffles (metadata.py).
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from semisparse.errors import ConfigError, ShapeError, TensorError
from semisparse.kernels import tiles, words
from semisparse.kernels.metadata import block_groups, block_rows, engine_words, log2, nibble_address, word_offsets
from semisparse.pattern import GROUP

MODES = ("transposable", "codes", "row", "soft")
"""What a tile keeps: the best transposable tile; a given code; the 2 largest of each row; these, shrunk."""

TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@dataclass(frozen=True, slots=True)
class Block:
    """Tile rows and tile pairs of one program, and its warps."""

    tile_rows: int = 16
    pairs: int = 8
    warps: int = 4


DEFAULT_BLOCK = Block()


@triton.jit
def _load_line(at, mask, IN: tl.constexpr, OUT: tl.constexpr, NATIVE: tl.constexpr, SOFT: tl.constexpr):
    """One row of each tile: 4 scores, 4 fp32 values, and the values as 2 words of OUT. at: int64 pointers."""
    values = ()
    if IN == tl.float32:
        halves = tl.load(at[:, :, :, None] + tl.arange(0, 2)[None, None, None, :], mask=mask[:, :, :, None], other=0)
        left, right = tl.split(halves)
        for half in tl.static_range(2):
            two = right if half else left
            values = values + (two.to(tl.int32).to(tl.float32, bitcast=True),)
            values = values + ((two >> 32).to(tl.int32).to(tl.float32, bitcast=True),)
        scores = ()
        for j in tl.static_range(4):
            scores = scores + (words.score(values[j], NATIVE),)
        first = words.pack_word(values[0], values[1], OUT, NATIVE)
        second = words.pack_word(values[2], values[3], OUT, NATIVE)
    else:
        both = tl.load(at, mask=mask, other=0)
        first = both.to(tl.int32)
        second = (both >> 32).to(tl.int32)
        scores = words.word_scores(first, IN, NATIVE) + words.word_scores(second, IN, NATIVE)
        if SOFT or IN != OUT:
            values = words.word_values(first, IN) + words.word_values(second, IN)
        if IN != OUT:
            first = words.pack_word(values[0], values[1], OUT, NATIVE)
            second = words.pack_word(values[2], values[3], OUT, NATIVE)
    return scores, values, (first, second)


@triton.jit
def _store_metadata(
    packed, values_bytes, word, line, group, row_blocks, blocks,
    BITS: tl.constexpr, TURNED: tl.constexpr, TILE_ROWS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Put a program's metadata words, given for each tile pair, where the engine wants them; line, group: its first."""
    N: tl.constexpr = TILE_ROWS * PAIRS
    LINES: tl.constexpr = 8 * PAIRS if TURNED else 4 * TILE_ROWS
    GROUPS: tl.constexpr = TILE_ROWS if TURNED else 2 * PAIRS
    index = tl.arange(0, N)
    tile_row, pair = index // PAIRS, index % PAIRS
    # Within a block words have changed places, but each is still a word of its block.
    row_block = (line + (8 * pair if TURNED else 4 * tile_row)) // block_rows(BITS)
    block = (group + (tile_row if TURNED else 2 * pair)) // block_groups(BITS)
    first = nibble_address(line, group, blocks, BITS, log2(LINES), log2(GROUPS)) // 8
    at = (packed + values_bytes).to(tl.pointer_type(tl.int32)) + first
    moved = engine_words(tl.reshape(word, (N,)), BITS, TURNED, log2(PAIRS), N)
    offsets = word_offsets(blocks, BITS, TURNED, log2(PAIRS), log2(N))
    tl.store(at + offsets, moved, mask=(row_block < row_blocks) & (block < blocks))


@triton.jit
def prune_pack(
    matrix, codes, scale, packed, packed_t, rows, rows_padded, columns, stride,
    row_blocks, blocks, row_blocks_t, blocks_t,
    IN: tl.constexpr, OUT: tl.constexpr, MODE: tl.constexpr, TRANSPOSED: tl.constexpr, BITS: tl.constexpr,
    PADDING: tl.constexpr, TILE_ROWS: tl.constexpr, PAIRS: tl.constexpr, EVEN: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """The kernel; launch says what the arguments mean. stride: int64 words from row to row. EVEN: no edge in sight."""
    tile_row = tl.program_id(1) * TILE_ROWS + tl.arange(0, TILE_ROWS)[:, None, None]
    pair = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)[None, :, None]
    tile_column = 2 * pair + tl.arange(0, 2)[None, None, :]
    inside = (tile_row < rows_padded // 4) & (tile_column < columns // 4)
    if EVEN:
        inside = tl.full((TILE_ROWS, PAIRS, 2), 1, tl.int1)
    WIDTH: tl.constexpr = 2 if IN == tl.float32 else 1  # int64 words that hold one row of a tile
    first_row = (tl.program_id(1) * 4 * TILE_ROWS).to(tl.int64)
    start = matrix + first_row * stride + tl.program_id(0) * (2 * PAIRS * WIDTH)
    local_row = 4 * tl.arange(0, TILE_ROWS)[:, None, None]
    local = (2 * tl.arange(0, PAIRS)[None, :, None] + tl.arange(0, 2)[None, None, :]) * WIDTH
    scores, values, kept_words = (), (), ()
    for i in tl.static_range(4):
        present = inside
        if not EVEN:
            present = inside & (4 * tile_row + i < rows)
        line = _load_line(start + (local_row + i) * stride + local, present, IN, OUT, NATIVE, MODE == 3)
        scores, values, kept_words = scores + line[0], values + line[1], kept_words + line[2]
    if MODE == 0:
        choice = tiles.best_tile(scores)
    elif MODE == 1:
        at = codes + tile_row.to(tl.int64) * (columns // 4) + tile_column
        choice = tiles.both_codes(tl.load(at, mask=inside, other=tiles.ZERO_TILE))
    else:
        choice = tiles.best_rows(scores)
    if MODE == 3:
        soft = tiles.shrink(values, scores, choice, tl.load(scale))
        kept_words = ()
        for k in tl.static_range(8):
            kept_words = kept_words + (words.pack_word(soft[2 * k], soft[2 * k + 1], OUT, NATIVE),)

    nibbles = tiles.metadata_nibbles(choice)
    selectors = words.byte_selectors(nibbles)
    out = packed.to(tl.pointer_type(tl.int32)) + first_row * (columns // 4) + tl.program_id(0) * (2 * PAIRS)
    kept = words.kept_in_rows(kept_words, selectors, NATIVE)
    for i in tl.static_range(4):
        at = out + (local_row + i) * (columns // 4) + local // WIDTH
        tl.store(at, kept[i], mask=inside)
    if TRANSPOSED:
        out = packed_t.to(tl.pointer_type(tl.int32)) + (tl.program_id(0) * 8 * PAIRS).to(tl.int64) * (rows_padded // 4)
        out += tl.program_id(1) * TILE_ROWS
        kept = words.kept_in_columns(kept_words, selectors, NATIVE)
        for j in tl.static_range(4):
            at = out + (4 * (local // WIDTH) + j) * (rows_padded // 4) + local_row // 4
            tl.store(at, kept[j], mask=inside)

    if not EVEN:
        nibbles = tl.where(inside, nibbles, PADDING)
    even, odd = tl.split(nibbles)
    values_bytes = rows_padded.to(tl.int64) * columns
    line, group = tl.program_id(1) * 4 * TILE_ROWS, tl.program_id(0) * 2 * PAIRS
    word = (even & 0xFFFF) | (odd << 16)
    _store_metadata(packed, values_bytes, word, line, group, row_blocks, blocks, BITS, False, TILE_ROWS, PAIRS)
    if TRANSPOSED:
        word = ((even >> 16) & 0xFFFF) | (odd & -0x10000)
        line, group = tl.program_id(0) * 8 * PAIRS, tl.program_id(1) * TILE_ROWS
        _store_metadata(packed_t, values_bytes, word, line, group, row_blocks_t, blocks_t, BITS, True, TILE_ROWS, PAIRS)


def launch(
    matrix: Tensor,
    packed: Tensor,
    packed_t: Tensor | None,
    *,
    dtype: torch.dtype,
    bits: tuple[int, ...],
    padding: int,
    mode: str = "transposable",
    rows_padded: int | None = None,
    codes: Tensor | None = None,
    scale: Tensor | None = None,
    block: Block = DEFAULT_BLOCK,
) -> None:
    """Prune matrix (R x C) and write it into packed, its transpose into packed_t. Asynchronous, on the current stream.

    matrix: fp32, fp16 or bf16; rows 16-byte aligned and contiguous (other strides are copied first); C a multiple of
    16. rows_padded: R or more, a multiple of 16: zero rows are added up to it. dtype: of the packed values, fp16 or bf16;
    rounded to once, after the choice. packed, packed_t: contiguous uint8, long enough for values and whole metadata
    blocks; packed_t is None for modes "row" and "soft", which are 2:4 along the columns only.
    bits, padding: order of the metadata within a block, and the nibble for groups outside the matrix (gemm/layout.py).
    mode: "transposable" is bit for bit reference.masks.transposable, "row" reference.masks.row; "codes" takes the tile
    codes of codes (int16, R/4 x C/4, contiguous; bit 4 * i + j keeps entry (i, j)); "soft" shrinks each row's kept two
    by the larger of the others and multiplies by scale (fp32, one element, on the device), in fp32.
    Raises ShapeError, TensorError, ConfigError.
    """
    rows, columns = matrix.shape
    rows_padded = rows if rows_padded is None else rows_padded
    _check(matrix, packed, packed_t, dtype, bits, mode, rows_padded, codes, scale, block)
    if matrix.stride(1) != 1 or matrix.stride(0) * matrix.itemsize % 16 or matrix.data_ptr() % 16:
        matrix = matrix.clone(memory_format=torch.contiguous_format)
    block_lines = 1 << sum(bit < 32 for bit in bits)
    span = (1 << len(bits)) // block_lines
    grid = (triton.cdiv(columns, 8 * block.pairs), triton.cdiv(rows_padded, 4 * block.tile_rows))
    even = rows == rows_padded and not (columns % (8 * block.pairs) or rows % (4 * block.tile_rows))
    prune_pack[grid](
        matrix.view(torch.int64),
        codes,
        scale,
        packed,
        packed_t,
        rows,
        rows_padded,
        columns,
        matrix.stride(0) * matrix.itemsize // 8,
        triton.cdiv(rows_padded, block_lines),
        triton.cdiv(columns // GROUP, span),
        triton.cdiv(columns, block_lines),
        triton.cdiv(rows_padded // GROUP, span),
        IN=TYPES[matrix.dtype],
        OUT=TYPES[dtype],
        MODE=MODES.index(mode),
        TRANSPOSED=packed_t is not None,
        BITS=bits,
        PADDING=_repeated(padding),
        TILE_ROWS=block.tile_rows,
        PAIRS=block.pairs,
        EVEN=even,
        NATIVE=matrix.is_cuda,
        num_warps=block.warps,
    )


def _repeated(nibble: int) -> int:
    """A word of 8 times the same nibble, as a signed integer."""
    return (nibble * 0x11111111 ^ 0x80000000) - 0x80000000


def _check(
    matrix: Tensor,
    packed: Tensor,
    packed_t: Tensor | None,
    dtype: torch.dtype,
    bits: tuple[int, ...],
    mode: str,
    rows_padded: int,
    codes: Tensor | None,
    scale: Tensor | None,
    block: Block,
) -> None:
    rows, columns = matrix.shape
    if matrix.dtype not in TYPES or dtype not in (torch.float16, torch.bfloat16):
        raise TensorError(f"matrix is {matrix.dtype}, packed as {dtype}; use fp32, fp16 or bf16, packed as fp16 or bf16")
    if columns % 16 or rows_padded % 16 or rows_padded < rows:
        raise ShapeError(f"matrix is {rows} x {columns}, padded to {rows_padded} rows; both must be multiples of 16")
    if mode not in MODES:
        raise ConfigError(f"mode={mode!r} is not one of {', '.join(map(repr, MODES))}")
    if packed_t is not None and mode in ("row", "soft"):
        raise ConfigError(f"mode={mode!r} keeps 2:4 along the columns only: pass packed_t=None")
    if mode == "codes" and (codes is None or codes.dtype != torch.int16 or not codes.is_contiguous()):
        raise TensorError("mode='codes' needs contiguous int16 tile codes")
    if mode == "codes" and codes.shape != (rows_padded // GROUP, columns // GROUP):
        raise ShapeError(f"codes has shape {tuple(codes.shape)}; it must be {(rows_padded // GROUP, columns // GROUP)}")
    if mode == "soft" and (scale is None or scale.dtype != torch.float32 or scale.numel() != 1):
        raise TensorError("mode='soft' needs scale, one float32 element on the device of matrix")
    lines = 1 << sum(bit < 32 for bit in bits)
    span = (1 << len(bits)) // lines
    if any(size % lines for size in (4 * block.tile_rows, 8 * block.pairs)) or any(
        size % span for size in (block.tile_rows, 2 * block.pairs)
    ):
        raise ConfigError(f"a program of {block} does not hold whole metadata blocks of {lines} rows x {span} groups")
    for name, buffer, (r, c) in (("packed", packed, (rows_padded, columns)), ("packed_t", packed_t, (columns, rows_padded))):
        needed = r * c + triton.cdiv(r, lines) * lines * triton.cdiv(c // GROUP, span) * span // 2
        if buffer is not None and (buffer.dtype != torch.uint8 or not buffer.is_contiguous()):
            raise TensorError(f"{name} must be a contiguous uint8 tensor")
        if buffer is not None and buffer.numel() < needed:
            raise ShapeError(f"{name} has {buffer.numel()} bytes; a {r} x {c} matrix needs {needed}")
