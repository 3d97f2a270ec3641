"""Triton functions that write metadata nibbles where the engine expects them; the bit order is a compile-time constant.

The engine stores nibble (row, group) at an address whose bits are bits of row and group in some order, within blocks of
a power of two of rows and groups; blocks are stored row by row. BITS is MetadataLayout.bits (formats/layout.py): that
order, lowest address bit first.

Here a thread first holds a word of 8 nibbles of a tile pair (two tiles side by side): position bits 0 and 1 are the
line within the tile, bit 2 the tile within the pair. For W the lines are rows and the pair differs in group bit 0; for
W^T the lines are columns of W and the pair differs in row bit 2. The words of a program form a 1-D tensor of N = tile
rows x tile pairs entries. The bits of a word's index are 2 bits of the pair, 3 of the tile row (these 5 are the lane of
a warp), the rest of the pair, the rest of the tile row. The engine's words hold three other address bits, so position
bits change places with bits of the index: each *exchange* is one shuffle between two threads. Afterwards each thread
stores a full word.
"""

import triton
import triton.language as tl

from semisparse.formats.layout import GROUP_BIT

TILE_ROW_BIT = 32
"""Added to the number of a tile row's bit in an order of index bits, to tell it from a pair's."""

_GROUP_BIT = tl.constexpr(GROUP_BIT)
_TILE_ROW_BIT = tl.constexpr(TILE_ROW_BIT)


@triton.constexpr_function
def lanes_first(log_pairs, log_tile_rows):
    """The order in which a warp holds 4 pairs x 8 tile rows; then come the other pairs, then the other tile rows."""
    first = [0, 1, *(TILE_ROW_BIT + t for t in range(3)), *range(2, log_pairs)]
    return tuple(first + [TILE_ROW_BIT + t for t in range(3, log_tile_rows)])


@triton.constexpr_function
def stacks_last(log_pairs, log_tile_rows):
    """The order in which a warp holds 8 pairs x 4 stacks; then come other pairs and stacks, then the rows of a stack.

    A stack is 4 tile rows: a thread holds one of each stack's pairs, and so 4 words.
    """
    first = [0, 1, 2, TILE_ROW_BIT + 2, TILE_ROW_BIT + 3, *range(3, log_pairs)]
    return tuple(first + [TILE_ROW_BIT + t for t in (*range(4, log_tile_rows), 0, 1)])


@triton.constexpr_function
def _source(turned, order, f):
    """The address source that bit f of the word's index stands for, before any exchange."""
    if order[f] < TILE_ROW_BIT:
        return order[f] + 3 if turned else order[f] + 1 + GROUP_BIT
    tile_row = order[f] - TILE_ROW_BIT
    return tile_row + GROUP_BIT if turned else tile_row + 2


@triton.constexpr_function
def _index_bit(turned, order, source):
    """The bit of the word's index that stands for an address source: the inverse of _source; negative if none does."""
    sources = [_source(turned, order, f) for f in range(len(order))]
    return sources.index(source) if source in sources else -1


@triton.constexpr_function
def _held(bits, turned, swaps):
    """Sources at the 3 positions of a word once those that belong there are in place; or the swaps that do it."""
    held, partners = [0, 1, 2 if turned else GROUP_BIT], []
    for position in range(3):
        now = held.index(bits[position]) if bits[position] in held else position
        held[position], held[now] = held[now], held[position]
        partners.append(now)
    return tuple(partners) if swaps else tuple(held)


@triton.constexpr_function
def _stride(bits, turned, order, f, part):
    """Words between two words that differ in bit f of their index: within a block, or blocks (rows, groups) apart."""
    source = _source(turned, order, f)
    held = _held(bits, turned, False)
    for position in range(3):
        if held[position] != bits[position] and _index_bit(turned, order, bits[position]) == f:
            source = held[position]
    if source in bits:
        return (1 << list(bits).index(source) - 3) if part == "inner" else 0  # Triton's tuples have no index()
    inside = sum(1 for bit in bits if (bit < GROUP_BIT) == (source < GROUP_BIT))
    blocks = 1 << (source if source < GROUP_BIT else source - GROUP_BIT) - inside
    return blocks if part == ("row" if source < GROUP_BIT else "group") else 0


@triton.constexpr_function
def _rows(bits):
    """log2 of a block's rows."""
    return sum(1 for bit in bits if bit < GROUP_BIT)


@triton.constexpr_function
def block_rows(bits):
    """Rows in a block."""
    return 1 << sum(1 for bit in bits if bit < GROUP_BIT)


@triton.constexpr_function
def block_groups(bits):
    """Groups of four columns in a block."""
    return 1 << sum(1 for bit in bits if bit >= GROUP_BIT)


@triton.constexpr_function
def log2(power):
    """log2 of a power of two."""
    return power.bit_length() - 1


@triton.constexpr_function
def _size(bits):
    """log2 of a block's nibbles."""
    return len(bits)


@triton.jit
def _swap(word, ONE: tl.constexpr, OTHER: tl.constexpr):
    """The nibbles of a word, with position bits ONE and OTHER trading places."""
    SHIFT: tl.constexpr = 4 * ((1 << OTHER) - (1 << ONE)) if OTHER > ONE else 4 * ((1 << ONE) - (1 << OTHER))
    MOVES: tl.constexpr = 0x00F000F0 if ONE + OTHER == 1 else (0x0000F0F0 if ONE + OTHER == 2 else 0x0000FF00)
    other = (word ^ (word >> SHIFT)) & MOVES
    return word ^ other ^ (other << SHIFT)


@triton.jit
def _exchange(word, POSITION: tl.constexpr, INDEX_BIT: tl.constexpr, N: tl.constexpr):
    """Position bit POSITION of the nibbles and bit INDEX_BIT of the word's index trade places."""
    pairs = tl.reshape(word, (N >> (INDEX_BIT + 1), 2, 1 << INDEX_BIT))
    other = (tl.sum(pairs, axis=1, keep_dims=True) - pairs).to(tl.uint32, bitcast=True)
    upper = tl.arange(0, 2)[None, :, None] == 1
    SHIFT: tl.constexpr = 4 << POSITION
    LOWER: tl.constexpr = 0x0F0F0F0F if POSITION == 0 else (0x00FF00FF if POSITION == 1 else 0x0000FFFF)
    turn = tl.where(upper, 32 - SHIFT, SHIFT).to(tl.uint32)
    moved = ((other << turn) | (other >> (32 - turn))).to(tl.int32, bitcast=True)
    stays = tl.where(upper, ~LOWER, LOWER)
    return tl.reshape((pairs & stays) | (moved & ~stays), (N,))


@triton.jit
def engine_words(word, BITS: tl.constexpr, TURNED: tl.constexpr, ORDER: tl.constexpr, N: tl.constexpr):
    """Words of tile pairs (1-D, N) turned into words as the engine stores them; word_offsets says where each goes."""
    for k in tl.static_range(3):
        if _held(BITS, TURNED, True)[k] != k:
            word = _swap(word, k, _held(BITS, TURNED, True)[k])
    for k in tl.static_range(3):
        if _held(BITS, TURNED, False)[k] != BITS[k]:
            word = _exchange(word, k, _index_bit(TURNED, ORDER, BITS[k]), N)
    return word


@triton.jit
def word_offsets(blocks, BITS: tl.constexpr, TURNED: tl.constexpr, ORDER: tl.constexpr, LOG_N: tl.constexpr):
    """Where each of the N engine words lies, in words from the first; blocks: metadata blocks in a row of blocks."""
    index = tl.arange(0, 1 << LOG_N)
    SIZE: tl.constexpr = 1 << (_size(BITS) - 3)
    offset = tl.zeros((1 << LOG_N,), tl.int32)
    for f in tl.static_range(LOG_N):
        step = _stride(BITS, TURNED, ORDER, f, "inner") + SIZE * _stride(BITS, TURNED, ORDER, f, "group")
        offset += ((index >> f) & 1) * (step + blocks * (SIZE * _stride(BITS, TURNED, ORDER, f, "row")))
    return offset


@triton.jit
def nibble_address(row, group, blocks, BITS: tl.constexpr, ROW_ZEROS: tl.constexpr, GROUP_ZEROS: tl.constexpr):
    """Address of the nibble of a row and group (scalars or tensors), int64, in nibbles.

    The lowest ROW_ZEROS bits of row and GROUP_ZEROS bits of group are known to be zero.
    """
    ROWS: tl.constexpr = _rows(BITS)
    SIZE: tl.constexpr = _size(BITS)
    address = (((row >> ROWS).to(tl.int64) * blocks) + (group >> (SIZE - ROWS))) << SIZE
    for k in tl.static_range(SIZE):
        if BITS[k] < _GROUP_BIT:
            if BITS[k] >= ROW_ZEROS:
                address += ((row >> BITS[k]) & 1) << k
        elif BITS[k] - _GROUP_BIT >= GROUP_ZEROS:
            address += ((group >> (BITS[k] - _GROUP_BIT)) & 1) << k
    return address


@triton.jit
def _store_words(
    packed, values_bytes, words, pair, tile_row, line, group, row_blocks, blocks,
    BITS: tl.constexpr, TURNED: tl.constexpr, ORDER: tl.constexpr, TILE_ROWS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Put a program's metadata words (1-D, in the order of ORDER), pair and tile_row of each, where they belong."""
    N: tl.constexpr = TILE_ROWS * PAIRS
    LINES: tl.constexpr = 8 * PAIRS if TURNED else 4 * TILE_ROWS
    GROUPS: tl.constexpr = TILE_ROWS if TURNED else 2 * PAIRS
    # Within a block words have changed places, but each is still a word of its block.
    row_block = (line + (8 * pair if TURNED else 4 * tile_row)) // block_rows(BITS)
    block = (group + (tile_row if TURNED else 2 * pair)) // block_groups(BITS)
    first = nibble_address(line, group, blocks, BITS, log2(LINES), log2(GROUPS)) // 8
    at = (packed + values_bytes).to(tl.pointer_type(tl.int32)) + first
    moved = engine_words(words, BITS, TURNED, ORDER, N)
    offsets = word_offsets(blocks, BITS, TURNED, ORDER, log2(N))
    tl.store(at + offsets, moved, mask=(row_block < row_blocks) & (block < blocks))


@triton.jit
def store_metadata(
    packed, values_bytes, word, line, group, row_blocks, blocks,
    BITS: tl.constexpr, TURNED: tl.constexpr, TILE_ROWS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Put a program's metadata words, given for each tile pair, where the engine wants them; line, group: its first."""
    N: tl.constexpr = TILE_ROWS * PAIRS
    ORDER: tl.constexpr = lanes_first(log2(PAIRS), log2(TILE_ROWS))
    index = tl.arange(0, N)
    pair = (index & 3) + 4 * ((index // 32) % (PAIRS // 4))
    tile_row = (index // 4 & 7) + 8 * (index // (8 * PAIRS))
    words = tl.reshape(tl.permute(word, (2, 1, 0)), (N,))
    _store_words(
        packed, values_bytes, words, pair, tile_row, line, group, row_blocks, blocks,
        BITS, TURNED, ORDER, TILE_ROWS, PAIRS,
    )  # fmt: skip


@triton.jit
def store_stacked_metadata(
    packed, values_bytes, words, line, group, row_blocks, blocks,
    BITS: tl.constexpr, TURNED: tl.constexpr, TILE_ROWS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """store_metadata where words are those of the four tile rows of each stack: a tuple of 8 x 4 x N / 128."""
    N: tl.constexpr = TILE_ROWS * PAIRS
    ORDER: tl.constexpr = stacks_last(log2(PAIRS), log2(TILE_ROWS))
    index = tl.arange(0, N)
    rest = index // 32 % (N // 128)
    pair = (index & 7) + 8 * (rest % (PAIRS // 8))
    tile_row = index // (N // 4) + 4 * (index // 8 & 3) + 16 * (rest // (PAIRS // 8))
    flat = ()
    for row in tl.static_range(4):
        flat = flat + (tl.reshape(tl.permute(words[row], (2, 1, 0)), (N // 4,)),)
    joined = tl.join(tl.join(flat[0], flat[1]), tl.join(flat[2], flat[3]))
    joined = tl.reshape(tl.permute(joined, (2, 1, 0)), (N,))
    _store_words(
        packed, values_bytes, joined, pair, tile_row, line, group, row_blocks, blocks,
        BITS, TURNED, ORDER, TILE_ROWS, PAIRS,
    )  # fmt: skip


def repeated(nibble: int) -> int:
    """A word of 8 times the same nibble, as a signed integer."""
    return (nibble * 0x11111111 ^ 0x80000000) - 0x80000000
