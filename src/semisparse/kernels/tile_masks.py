"""Triton tile functions: which entries of a 4x4 tile are kept. Every tensor holds one value per tile.

The kept entries travel as a *choice* (int32): the tile code (bit 4 * i + j is set when entry (i, j) is kept) in the
lower 16 bits, the code of the transposed tile in the upper 16. With both directions in one word, the metadata of all 8
groups (4 rows, then 4 columns) comes from the same few instructions.

The tables are generated from semisparse.pattern. The order of the sums and the rule for equals are those of
reference.masks, bit for bit.
"""

import triton
import triton.language as tl

from semisparse.pattern import GROUP, HALVES, ROW_BITS, ROW_CHOICES, TRANSPOSABLE_TILES, complement


def _choice(code: int) -> int:
    """Tile code and the code of the transposed tile in one signed 32-bit integer."""
    bits = [(i, j) for i in range(GROUP) for j in range(GROUP) if code >> GROUP * i + j & 1]
    return _signed(code | sum(1 << GROUP * j + i + GROUP * GROUP for i, j in bits))


def _signed(word: int) -> int:
    """A 32-bit pattern as a signed integer, which is how Triton types its constants."""
    return (word & 0xFFFFFFFF ^ 0x80000000) - 0x80000000


_PAIRS = [pair for pairs in HALVES.values() for pair in pairs]
_FIRST = [pairs[0] for pairs in HALVES.values()]  # each vector's first half, at whose choice a sum starts
_VECTOR = [k for k, pairs in enumerate(HALVES.values()) for _ in pairs]
_PARTNER = [list(HALVES).index(complement(counts)) for counts in HALVES]


def _half_bits(pair: tuple[int, int]) -> int:
    return ROW_BITS[pair[0]] | ROW_BITS[pair[1]] << GROUP


# Globals that a Triton function reads must be constants of its own kind, and flat.
_LOW = tl.constexpr(tuple(low for low, _ in ROW_CHOICES))
_HIGH = tl.constexpr(tuple(high for _, high in ROW_CHOICES))
_UPPER = tl.constexpr(tuple(upper for upper, _ in _PAIRS))
_LOWER = tl.constexpr(tuple(lower for _, lower in _PAIRS))
_COUNT_VECTOR = tl.constexpr(tuple(_VECTOR))
_COMPLEMENT = tl.constexpr(tuple(_PARTNER))
_VECTORS = tl.constexpr(len(HALVES))
_HALF_COUNT = tl.constexpr(len(_PAIRS))
_IS_FIRST = tl.constexpr(tuple(pair in _FIRST for pair in _PAIRS))
_ALONE = tl.constexpr(tuple(len(pairs) == 1 for pairs in HALVES.values()))
# What a half changes in the choice when it is taken instead of its vector's first half (exclusive or), and the choice
# made of the first halves of a vector and of its complement.
_UPPER_CHANGE = tl.constexpr(
    tuple(_choice(_half_bits(pair)) ^ _choice(_half_bits(_FIRST[k])) for pair, k in zip(_PAIRS, _VECTOR, strict=True))
)
_LOWER_CHANGE = tl.constexpr(
    tuple(
        _choice(_half_bits(pair) << 8) ^ _choice(_half_bits(_FIRST[k]) << 8)
        for pair, k in zip(_PAIRS, _VECTOR, strict=True)
    )
)
_FIRST_CHOICE = tl.constexpr(
    tuple(_choice(_half_bits(_FIRST[k]) | _half_bits(_FIRST[_PARTNER[k]]) << 8) for k in range(len(HALVES)))
)
ZERO_TILE = tl.constexpr(TRANSPOSABLE_TILES[0])
"""Code chosen for a tile of zeros: all totals are equal, and the first wins."""


@triton.jit
def _pair_sums(scores, ROW: tl.constexpr):
    """The sums of the 6 row choices of one row."""
    sums = ()
    for p in tl.static_range(6):
        sums = sums + (scores[4 * ROW + _LOW[p]] + scores[4 * ROW + _HIGH[p]],)
    return sums


@triton.jit
def _best_half(first, second, K: tl.constexpr, CHANGE: tl.constexpr):
    """For count vector K the largest half sum, first of equals, and its change to the choice."""
    best = first[0]
    change = tl.zeros(best.shape, tl.int32)
    for n in tl.static_range(_HALF_COUNT):
        if _COUNT_VECTOR[n] == K:
            total = first[_UPPER[n]] + second[_LOWER[n]]
            if _IS_FIRST[n]:
                best = total
            else:
                change = tl.where(total > best, CHANGE[n], change)
                best = tl.maximum(best, total)
    return best, change


@triton.jit
def best_tile(scores):
    """The choice of the best transposable tile; scores: 16 fp32 tensors, row by row, no NaN.

    The order of the sums and the rule for equals are those of reference.masks.transposable_codes, bit for bit. The
    halves are made where they are needed, vector by vector, so that few of them wait in registers.
    """
    sums = (_pair_sums(scores, 0), _pair_sums(scores, 1), _pair_sums(scores, 2), _pair_sums(scores, 3))
    best = scores[0]
    choice = tl.zeros(best.shape, tl.int32)
    for k in tl.static_range(_VECTORS):
        upper, upper_change = _best_half(sums[0], sums[1], k, _UPPER_CHANGE)
        lower, lower_change = _best_half(sums[2], sums[3], _COMPLEMENT[k], _LOWER_CHANGE)
        total = upper + lower
        if _ALONE[k]:
            candidate = tl.full(total.shape, _FIRST_CHOICE[k], tl.int32)
        else:
            candidate = upper_change ^ _FIRST_CHOICE[k] ^ lower_change
        if k == 0:
            choice = candidate
            best = total
        else:
            choice = tl.where(total > best, candidate, choice)
            best = tl.maximum(best, total)
    return choice


@triton.jit
def _row_code(w0, w1, w2, w3):
    """The 2 largest of 4 as a 4-bit mask, the lower index of equals: an entry stays if it beats two of the others."""
    b01, b02, b03, b12, b13, b23 = w0 >= w1, w0 >= w2, w0 >= w3, w1 >= w2, w1 >= w3, w2 >= w3
    keep0 = (b01 & b02) | (b01 & b03) | (b02 & b03)
    keep1 = (~b01 & b12) | (~b01 & b13) | (b12 & b13)
    keep2 = (~b02 & ~b12) | (~b02 & b23) | (~b12 & b23)
    keep3 = (~b03 & ~b13) | (~b03 & ~b23) | (~b13 & ~b23)
    return tl.where(keep0, 1, 0) | tl.where(keep1, 2, 0) | tl.where(keep2, 4, 0) | tl.where(keep3, 8, 0)


@triton.jit
def best_rows(scores):
    """The choice that keeps the 2 largest of each row; what it says of the columns has no meaning."""
    code = tl.zeros(scores[0].shape, tl.int32)
    for i in tl.static_range(4):
        code = code | (_row_code(scores[4 * i], scores[4 * i + 1], scores[4 * i + 2], scores[4 * i + 3]) << (4 * i))
    return code


@triton.jit
def rank_key(value, score, SIGNED: tl.constexpr):
    """An int32 that orders as reference.masks.greedy does: by score (fp32, no NaN), if SIGNED negated for value < 0."""
    key = score.to(tl.int32, bitcast=True)  # a score is not negative, and the bits of such floats order as they do
    if SIGNED:
        key = tl.where(value < 0, -key, key)
    return key


@triton.jit
def best_greedy(keys):
    """The choice of reference.masks.greedy: from the largest key down, each entry whose row and column have room.

    keys: 16 int32 tensors of rank_key. A tile may keep 7; what the choice says of the columns has no meaning.
    """
    code = tl.zeros(keys[0].shape, tl.int32)
    seen = tl.zeros(keys[0].shape, tl.int32)
    for _ in range(16):
        largest = tl.full(keys[0].shape, -0x80000000, tl.int32)  # below every key
        at = tl.zeros(keys[0].shape, tl.int32)
        for k in tl.static_range(16):
            larger = (((seen >> k) & 1) == 0) & (keys[k] > largest)  # of equals the first
            largest = tl.where(larger, keys[k], largest)
            at = tl.where(larger, k, at)
        row = (code >> (at & 12)) & 0x000F
        column = (code >> (at & 3)) & 0x1111
        room = ((row & (row - 1)) == 0) & ((column & (column - 1)) == 0)  # at most one bit is set
        code = code | tl.where(room, 1 << at, 0)
        seen = seen | (1 << at)
    return code


@triton.jit
def shrink(values, scores, choice, scale):
    """Soft threshold of each row: sign(a) * max(|a| - t, 0) * scale, t the larger score of the two not kept."""
    result = ()
    for i in tl.static_range(4):
        threshold = tl.zeros(scores[0].shape, tl.float32)
        for j in tl.static_range(4):
            kept = ((choice >> (4 * i + j)) & 1) != 0
            threshold = tl.maximum(threshold, tl.where(kept, 0.0, scores[4 * i + j]))
        for j in tl.static_range(4):
            value = values[4 * i + j]
            rest = tl.abs(value) - threshold
            rest = tl.where(rest < 0, 0.0, rest) * scale  # a NaN stays one
            # Not -rest: what shrinks to 0 is +0. (Up to Triton 3.6 -x was 0 - x; in 3.9 it flips the sign of 0 too.)
            result = result + (tl.where(value < 0, 0.0 - rest, rest),)
    return result


@triton.jit
def both_codes(code):
    """The choice of a tile code (any integer type): the 4x4 bit matrix and its transpose."""
    code = code.to(tl.int32) & 0xFFFF
    other = (code ^ (code >> 3)) & 0x0A0A
    turned = code ^ other ^ (other << 3)
    other = (turned ^ (turned >> 6)) & 0x00CC
    turned = turned ^ other ^ (other << 6)
    return code | (turned << 16)


@triton.jit
def metadata_nibbles(choice):
    """pattern.metadata_nibble of the 8 groups of a choice at once; each group keeps exactly two.

    With kept bits b0 to b3 the nibble's bits are ~b0 & b1, ~(b0 | b1), ~b2 | b3 and b2 | b3.
    """
    down = choice >> 1
    either = choice | (choice << 1)
    low = (down & ~choice & 0x11111111) | ((down | ~choice) & 0x44444444)
    return low | ((either ^ 0x22222222) & -0x55555556)
