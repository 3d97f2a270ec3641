"""Triton functions on packed words: 16-bit values in and out of 32-bit registers. Every tensor holds one word per tile.

A tile is 8 words (int32), two for each row: entries 0 and 1 in the first, 2 and 3 in the second, as 16-bit values, the
lower index in the lower half. Moving values as words halves the instructions, and a kept pair is stored as it is.

NATIVE selects PTX instructions that Triton cannot express; without it the same function is plain Triton, which the
CPU interpreter can run.
"""

import triton
import triton.language as tl


@triton.jit
def permute_bytes(low, high, selector, NATIVE: tl.constexpr):
    """Four bytes out of two words: nibble k of selector (0 to 7, bytes of low first) names result byte k."""
    if NATIVE:
        result = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [low, high, selector], tl.int32, True, 1
        )
    else:
        both = low.to(tl.uint32, bitcast=True).to(tl.uint64) | (high.to(tl.uint32, bitcast=True).to(tl.uint64) << 32)
        picked = tl.zeros(low.shape, tl.uint64)
        for k in tl.static_range(4):
            shift = tl.zeros(low.shape, tl.int32) + ((selector >> (4 * k)) & 7) * 8
            picked = picked | (((both >> shift.to(tl.uint64)) & 0xFF) << (8 * k))
        result = picked.to(tl.uint32).to(tl.int32, bitcast=True)
    return result


@triton.jit
def score(value, NATIVE: tl.constexpr):
    """Magnitude of an fp32 value, NaN counted as +Inf."""
    if NATIVE:
        result = tl.minimum(tl.abs(value), float("inf"))  # min.f32 takes the operand that is a number
    else:
        result = tl.where(value == value, tl.abs(value), float("inf"))
    return result


@triton.jit
def word_values(word, DTYPE: tl.constexpr):
    """The two 16-bit values of a word in fp32, exactly."""
    if DTYPE == tl.bfloat16:
        low = (word << 16).to(tl.float32, bitcast=True)
        high = (word & -0x10000).to(tl.float32, bitcast=True)
    else:
        low = word.to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
        high = (word >> 16).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
    return low, high


@triton.jit
def word_scores(word, DTYPE: tl.constexpr, NATIVE: tl.constexpr):
    """Scores (fp32) of the two 16-bit values of a word."""
    if NATIVE and DTYPE == tl.bfloat16:
        low, high = tl.inline_asm_elementwise(
            "{ .reg .b32 t; mov.b32 t, 0x7F807F80; min.bf16x2 t, $2, t;"
            " shl.b32 $0, t, 16; abs.f32 $0, $0; and.b32 $1, t, 0xFFFF0000; abs.f32 $1, $1; }",
            "=f,=f,r", [word], (tl.float32, tl.float32), True, 1,
        )  # fmt: skip
    elif NATIVE:
        low, high = tl.inline_asm_elementwise(
            "{ .reg .b32 t; .reg .b16 l, h; mov.b32 t, 0x7C007C00; min.f16x2 t, $2, t; mov.b32 {l, h}, t;"
            " cvt.f32.f16 $0, l; abs.f32 $0, $0; cvt.f32.f16 $1, h; abs.f32 $1, $1; }",
            "=f,=f,r", [word], (tl.float32, tl.float32), True, 1,
        )  # fmt: skip
    else:
        low, high = word_values(word, DTYPE)
        low, high = score(low, False), score(high, False)
    return low, high


@triton.jit
def rounded_bits(value, DTYPE: tl.constexpr):
    """Bits of an fp32 value rounded to DTYPE; by hand for bfloat16, which the interpreter would truncate."""
    if DTYPE == tl.bfloat16:
        bits = value.to(tl.int32, bitcast=True)
        bits = tl.where(value == value, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, 0x7FFF)
    else:
        bits = value.to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32)
    return bits


@triton.jit
def pack_word(low, high, DTYPE: tl.constexpr, NATIVE: tl.constexpr):
    """Two fp32 values, each rounded once to DTYPE (to nearest, ties to even), as one word."""
    if NATIVE and DTYPE == tl.bfloat16:
        word = tl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], tl.int32, True, 1)
    elif NATIVE:
        word = tl.inline_asm_elementwise("cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], tl.int32, True, 1)
    else:
        word = (rounded_bits(low, DTYPE) & 0xFFFF) | (rounded_bits(high, DTYPE) << 16)
    return word


@triton.jit
def byte_selectors(nibbles):
    """What permute_bytes needs to pick the first and second kept value: two words for even groups, two for odd ones."""
    fields = nibbles.to(tl.uint32, bitcast=True)
    even_first = ((fields & 0x03030303) * 0x22 + 0x10101010).to(tl.int32, bitcast=True)
    even_second = (((fields >> 2) & 0x03030303) * 0x22 + 0x10101010).to(tl.int32, bitcast=True)
    odd_first = (((fields >> 4) & 0x03030303) * 0x22 + 0x10101010).to(tl.int32, bitcast=True)
    odd_second = (((fields >> 6) & 0x03030303) * 0x22 + 0x10101010).to(tl.int32, bitcast=True)
    return even_first, even_second, odd_first, odd_second


@triton.jit
def _pick(low, high, selectors, n: tl.constexpr, NATIVE: tl.constexpr):
    """Both kept values of group n (0 to 7) of a choice, as one word; low and high hold the group's 4 values."""
    pair = permute_bytes(selectors[2 * (n % 2)], selectors[2 * (n % 2) + 1], n // 2 * 0x11 + 0x40, NATIVE)
    return permute_bytes(low, high, pair, NATIVE)


@triton.jit
def kept_in_rows(words, selectors, NATIVE: tl.constexpr):
    """For each of the 4 rows the two kept values as one word."""
    kept = ()
    for i in tl.static_range(4):
        kept = kept + (_pick(words[2 * i], words[2 * i + 1], selectors, i, NATIVE),)
    return kept


@triton.jit
def kept_in_columns(words, selectors, NATIVE: tl.constexpr):
    """For each of the 4 columns the two kept values as one word."""
    kept = ()
    for j in tl.static_range(4):
        halves = 0x7632 if j % 2 else 0x5410
        low = permute_bytes(words[j // 2], words[2 + j // 2], halves, NATIVE)
        high = permute_bytes(words[4 + j // 2], words[6 + j // 2], halves, NATIVE)
        kept = kept + (_pick(low, high, selectors, 4 + j, NATIVE),)
    return kept


@triton.jit
def store_columns(out, kept, inside, local_pair, local_row, row_words, REST: tl.constexpr):
    """Store the kept words of the 4 columns of tile pairs (4 x 8 x REST x 2) in the packed transpose.

    The two tiles of a pair lie far apart there. Stored one by one, in the order in which the lanes hold them, a warp
    fills whole sectors; left to itself, Triton would go through shared memory to make the stores wider.
    """
    for j in tl.static_range(4):
        two, wanted = tl.split(kept[j]), tl.split(inside)
        for odd in tl.static_range(2):
            line = (8 * local_pair + 4 * odd + j) * row_words + local_row
            at = tl.max_contiguous(tl.reshape(line, (4, 8, REST)), (1, 1, 1))
            tl.store(out + at, two[odd], mask=wanted[odd])


@triton.jit
def load_line(at, mask, IN: tl.constexpr, OUT: tl.constexpr, NATIVE: tl.constexpr, SOFT: tl.constexpr):
    """One row of each tile: 4 scores, 4 fp32 values, and the values as 2 words of OUT. at: int64 pointers."""
    values = ()
    if IN == tl.float32:
        halves = tl.load(at[:, :, :, :, None] + tl.arange(0, 2), mask=mask[:, :, :, :, None], other=0)
        left, right = tl.split(halves)
        for half in tl.static_range(2):
            two = right if half else left
            values = values + (two.to(tl.int32).to(tl.float32, bitcast=True),)
            values = values + ((two >> 32).to(tl.int32).to(tl.float32, bitcast=True),)
        scores = ()
        for j in tl.static_range(4):
            scores = scores + (score(values[j], NATIVE),)
        first = pack_word(values[0], values[1], OUT, NATIVE)
        second = pack_word(values[2], values[3], OUT, NATIVE)
    else:
        both = tl.load(at, mask=mask, other=0)
        first = both.to(tl.int32)
        second = (both >> 32).to(tl.int32)
        scores = word_scores(first, IN, NATIVE) + word_scores(second, IN, NATIVE)
        if SOFT or IN != OUT:
            values = word_values(first, IN) + word_values(second, IN)
        if IN != OUT:
            first = pack_word(values[0], values[1], OUT, NATIVE)
            second = pack_word(values[2], values[3], OUT, NATIVE)
    return scores, values, (first, second)
