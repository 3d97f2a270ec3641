"""Triton functions for the minimum-variance unbiased 2:4 sample of four tokens: reference/mvue.py, bit for bit.

Every tensor holds one number per tile; a group is a column of a tile. Where a compiler may fuse a product into a sum,
the product is exact (with a power of two), so that fusing changes nothing.
"""

import triton
import triton.language as tl

from semisparse import sampling
from semisparse.kernels import packed_values

_FOLD = tl.constexpr(sampling.FOLD)
_SHIFT = tl.constexpr(32 - sampling.UNIFORM_BITS)
_ONE = tl.constexpr(0x3F800000)  # of fp32; 23 bits of a random word below it make a number from 1 to 2
_BELOW_ONE = tl.constexpr(1.0 - 2.0 ** -(sampling.UNIFORM_BITS + 1))


@triton.jit
def _product(word, factor: tl.constexpr, NATIVE: tl.constexpr):
    """The lower and the upper word of a product of two words."""
    if NATIVE:  # one instruction for both
        lower, upper = tl.inline_asm_elementwise(
            "{ .reg .b64 t; mul.wide.u32 t, $2, $3; mov.b64 {$0, $1}, t; }",
            "=r,=r,r,r", [word, factor], (tl.uint32, tl.uint32), True, 1,
        )  # fmt: skip
    else:
        lower = tl.mul(word, factor, sanitize_overflow=False)
        upper = tl.umulhi(word, tl.full(word.shape, factor, tl.uint32))
    return lower, upper


@triton.jit
def philox(a, b, c, d, low, high, NATIVE: tl.constexpr):
    """Philox4x32-10: four random words of a counter (a, b, c, d) and a key (low, high), all uint32."""
    for _ in tl.static_range(10):
        left = _product(a, 0xD2511F53, NATIVE)
        right = _product(c, 0xCD9E8D57, NATIVE)
        a, b, c, d = right[1] ^ b ^ low, right[0], left[1] ^ d ^ high, left[0]
        low = tl.add(low, 0x9E3779B9, sanitize_overflow=False)
        high = tl.add(high, 0xBB67AE85, sanitize_overflow=False)
    return a, b, c, d


@triton.jit
def random_words(words, tile_row, tile_column, seed, NATIVE: tl.constexpr):
    """The random words (uint32) of a tile's four groups. words: its 8 words, by rows; seed: int64."""
    left, right = words[0].to(tl.uint32, bitcast=True), words[1].to(tl.uint32, bitcast=True)
    for i in tl.static_range(1, 4):
        left = left * _FOLD + words[2 * i].to(tl.uint32, bitcast=True)
        right = right * _FOLD + words[2 * i + 1].to(tl.uint32, bitcast=True)
    row = (tile_row + tl.zeros_like(words[0])).to(tl.uint32, bitcast=True)
    column = (tile_column + tl.zeros_like(words[0])).to(tl.uint32, bitcast=True)
    return philox(row, column, left, right, seed.to(tl.uint32), (seed >> 32).to(tl.uint32), NATIVE)


@triton.jit
def uniform(word):
    """The uniform (fp32) of a random word."""
    bits = (word >> _SHIFT).to(tl.int32, bitcast=True) | _ONE
    return bits.to(tl.float32, bitcast=True) - _BELOW_ONE


@triton.jit
def uniforms(words, tile_row, tile_column, seed, NATIVE: tl.constexpr):
    """The uniforms of a tile's four groups (fp32); arguments as random_words'."""
    drawn = random_words(words, tile_row, tile_column, seed, NATIVE)
    numbers = ()
    for j in tl.static_range(4):
        numbers = numbers + (uniform(drawn[j]),)
    return numbers


@triton.jit
def _scaled(pair, least, DTYPE: tl.constexpr, NATIVE: tl.constexpr):
    """A word of two values: the larger of each magnitude and least, rounded, with the value's sign. NaN stays NaN."""
    if NATIVE:
        KIND: tl.constexpr = "bf16x2" if DTYPE == tl.bfloat16 else "f16x2"
        word = tl.inline_asm_elementwise(
            "{ .reg .b32 l, a, s; cvt.rn." + KIND + ".f32 l, $2, $2; and.b32 a, $1, 0x7FFF7FFF;"
            " max.NaN." + KIND + " a, a, l; and.b32 s, $1, 0x80008000; or.b32 $0, a, s; }",
            "=r,r,f", [pair, least], tl.int32, True, 1,
        )  # fmt: skip
    else:
        low, high = packed_values.word_values(pair, DTYPE)
        low_size = tl.where(low == low, tl.maximum(tl.abs(low), least), float("nan"))
        high_size = tl.where(high == high, tl.maximum(tl.abs(high), least), float("nan"))
        word = packed_values.pack_word(low_size, high_size, DTYPE, False) | (pair & -0x7FFF8000)
    return word


@triton.jit
def choose(a, b, c, d, number):
    """The places of the two kept entries of a group, first < second, and the least that a kept one becomes.

    a, b, c, d: magnitudes (fp32), NaN counted as +Inf; number: the group's uniform, above 0 and below 1.
    """
    upper, other_upper = tl.maximum(a, b), tl.maximum(c, d)
    rest = (tl.minimum(a, b) + tl.minimum(c, d)) + tl.minimum(upper, other_upper)
    largest = tl.maximum(upper, other_upper)
    limit = tl.where((rest > 0.0) & (largest < float("inf")), rest, largest)
    step = tl.minimum(limit * 0.5 + largest * 0.5, limit)
    first_sum = tl.minimum(a, limit)
    second_sum = first_sum + tl.minimum(b, limit)
    third_sum = second_sum + tl.minimum(c, limit)
    point = number * step
    one = tl.where(first_sum <= point, 1, 0) + tl.where(second_sum <= point, 1, 0) + tl.where(third_sum <= point, 1, 0)
    other = tl.where(first_sum - step <= point, 1, 0)
    other += tl.where(second_sum - step <= point, 1, 0)
    other += tl.where(third_sum - step <= point, 1, 0)
    first = tl.minimum(tl.minimum(one, other), 2)
    second = tl.maximum(tl.maximum(one, other), first + 1)
    return first, second, tl.minimum(step, rest)


@triton.jit
def sample_group(low, high, number, DTYPE: tl.constexpr, NATIVE: tl.constexpr):
    """The two kept values of a group as one word, and its metadata nibble.

    low, high: words of its first two and its last two values; number: as choose's.
    """
    a, b = packed_values.word_scores(low, DTYPE, NATIVE)
    c, d = packed_values.word_scores(high, DTYPE, NATIVE)
    first, second, least = choose(a, b, c, d, number)
    pair = packed_values.permute_bytes(low, high, first * 0x22 + second * 0x2200 + 0x1010, NATIVE)
    return _scaled(pair, least, DTYPE, NATIVE), first | (second << 2)
