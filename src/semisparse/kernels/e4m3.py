"""Triton functions for e4m3: reference/fp8.py, bit for bit.

NATIVE selects the conversion instruction of GPUs from capability 8.9 on (native_on says which). Without it the same
function is plain Triton, which older GPUs and the CPU interpreter can run.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl

_MANTISSA = tl.constexpr(20)  # bits of fp32's mantissa that e4m3 does not have
_BELOW_HALF = tl.constexpr((1 << 19) - 1)  # of what these bits can hold
_BIAS = tl.constexpr((127 - 7) << 3)  # of the exponent: fp32's less e4m3's
_SUBNORMAL = tl.constexpr(2.0**14)  # fp32 numbers from here on are apart as e4m3's subnormals are: by 2^-9
_SUBNORMAL_BITS = tl.constexpr((127 + 14) << 23)
_INFINITE = tl.constexpr(0x7F800000)
_NAN = tl.constexpr(0x7FC00000)
_ONE = tl.constexpr(127 << 23)

# The halves are not put together by "mov.b32 $0, {l, h}": ptxas 12.8 then takes h from a register that nothing has
# written where $3 and $4 are zeros at compile time, as in a matrix of one row.
_FOUR_CODES = tl.constexpr(
    "{ .reg .b16 l, h; .reg .b32 u; cvt.rn.satfinite.e4m3x2.f32 l, $2, $1; cvt.rn.satfinite.e4m3x2.f32 h, $4, $3;"
    " cvt.u32.u16 $0, l; cvt.u32.u16 u, h; shl.b32 u, u, 16; or.b32 $0, $0, u; }"
)


@lru_cache
def native_on(index: int) -> bool:
    """Whether CUDA device index has the conversion instruction; -1, the CPU's interpreter, has none."""
    return index >= 0 and torch.cuda.get_device_capability(index) >= (8, 9)


@triton.jit
def code(value):
    """The e4m3 code (int32, 0 to 255) of an fp32 value: clamped to +-448, to nearest, ties to even; NaN is 0x7F."""
    bits = value.to(tl.int32, bitcast=True)
    size = tl.minimum(tl.abs(value), 448.0)
    whole = size.to(tl.int32, bitcast=True)
    normal = ((whole + _BELOW_HALF + ((whole >> _MANTISSA) & 1)) >> _MANTISSA) - _BIAS
    # The sum rounds to a multiple of 2^-9, to nearest and ties to even.
    small = (size + _SUBNORMAL).to(tl.int32, bitcast=True) - _SUBNORMAL_BITS
    found = tl.where(size < 0.015625, small, normal) | ((bits >> 24) & 0x80)
    return tl.where(value == value, found, 0x7F)


@triton.jit
def code_at_random(size, sign, added):
    """The e4m3 code (int32, 0 to 255) of an fp32 magnitude, rounded up or down: fp8.encode_at_random.

    sign: int32, of which bit 31 counts; added: int32, a random number of the 20 bits that are cut off.
    """
    bounded = tl.minimum(size, 448.0)
    lifted = bounded < 0.015625
    whole = tl.where(lifted, bounded + 0.015625, bounded).to(tl.int32, bitcast=True)
    found = ((whole + added) >> _MANTISSA) - tl.where(lifted, _BIAS + 8, _BIAS)
    return tl.where(size < float("inf"), found | ((sign >> 24) & 0x80), 0x7F)


@triton.jit
def pack_two(low, high, NATIVE: tl.constexpr):
    """The codes of two fp32 values as a number of 16 bits (int32), the first value's below.

    The result of a multiplication is expected: on a GPU its NaN has no sign.
    """
    if NATIVE:
        two = tl.inline_asm_elementwise(
            "{ .reg .b16 t; cvt.rn.satfinite.e4m3x2.f32 t, $2, $1; cvt.u32.u16 $0, t; }",
            "=r,f,f", [low, high], tl.int32, True, 1,
        )  # fmt: skip
    else:
        two = code(low) | (code(high) << 8)
    return two


@triton.jit
def pack_four(a, b, c, d, NATIVE: tl.constexpr):
    """The codes of four fp32 values as a word (int32), the first value's lowest; values as pack_two's."""
    if NATIVE:
        word = tl.inline_asm_elementwise(
            _FOUR_CODES,
            "=r,f,f,f,f", [a, b, c, d], tl.int32, True, 1,
        )  # fmt: skip
    else:
        word = code(a) | (code(b) << 8) | (code(c) << 16) | (code(d) << 24)
    return word


@triton.jit
def codes(values, NATIVE: tl.constexpr):
    """The codes (uint8) of a tensor of fp32 values, in its shape; values as pack_two's.

    A thread must hold a multiple of four of them.
    """
    if NATIVE:
        result = tl.inline_asm_elementwise(
            _FOUR_CODES,
            "=r,f,f,f,f", [values], tl.uint8, True, 4,
        )  # fmt: skip
    else:
        result = code(values).to(tl.uint8)
    return result


@triton.jit
def multiplier_for(bits):
    """The multiplier of a tensor whose largest magnitude is the fp32 number with these bits (int32, not negative).

    2^k with the largest k for which the largest magnitude times 2^k is at most 448, k at most 126; 1 for 0; NaN if the
    magnitude is not finite.
    """
    # 448 = 1.75 * 2^8: a mantissa above 1.75 carries into the exponent.
    exponent = tl.minimum(262 - ((tl.minimum(bits, _INFINITE) + 0x1FFFFF) >> 23), 253)
    found = tl.where(bits == 0, _ONE, exponent << 23)
    return tl.where(bits >= _INFINITE, _NAN, found).to(tl.float32, bitcast=True)


@triton.jit
def inverse(power):
    """The inverse of a multiplier, which is the scale, or of a scale: exact; NaN for NaN."""
    bits = power.to(tl.int32, bitcast=True)
    return tl.where(power == power, 2 * _ONE - bits, _NAN).to(tl.float32, bitcast=True)


@triton.jit
def largest_word(words, count, WORDS: tl.constexpr):
    """The largest of `count` partial maxima (int32, as amax.py writes them); WORDS: a power of two, at least count."""
    place = tl.arange(0, WORDS)
    return tl.max(tl.load(words + place, mask=place < count, other=0), axis=0)
