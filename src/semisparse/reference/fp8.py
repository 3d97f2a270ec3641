"""Scaling and rounding to e4m3, 8 bits with 4 of exponent and 3 of mantissa, in plain PyTorch: the specification.

A tensor is scaled by one power of two and rounded: code = round(x * multiplier), x is about code * scale, and
multiplier * scale = 1 exactly. The cast is defined here, because that of Tensor.to treats values beyond 448 and Inf
differently between versions. All arithmetic is fp32; the same input gives the same bits on every device.
"""

import torch
from torch import Tensor

from semisparse.errors import TensorError

LARGEST = 448.0
"""The largest e4m3 number. The format (torch's float8_e4m3fn) has NaN and no Inf."""

NAN = 0x7F
"""The code of NaN. With the sign bit it is NaN, too, but never written: devices differ in the sign of a NaN product."""

LARGEST_EXPONENT = 126
"""Multipliers are 2^-126 to 2^126, so that they and their inverses are normal fp32 numbers."""

_MANTISSA = 20  # bits of fp32's mantissa that e4m3 does not have
_BIAS = (127 - 7) << 3  # of the exponent: fp32's less e4m3's
_SMALLEST_NORMAL = 2.0**-6
_SUBNORMAL = 2.0**14  # fp32 numbers from here on are apart as e4m3's subnormals are: by 2^-9


def largest_magnitude(x: Tensor) -> Tensor:
    """The largest |x|, NaN counted above Inf and Inf above all numbers: an integer maximum over the bits.

    Args:
        x: Any shape; fp32, fp16 or bf16.

    Returns:
        One fp32 number, exact; 0 for a tensor without elements.

    Raises:
        TensorError: x has another dtype.
    """
    kinds = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}
    if x.dtype not in kinds:
        raise TensorError(f"x is {x.dtype}; fp8 takes float32, float16 or bfloat16")
    if x.numel() == 0:
        return x.new_zeros((), dtype=torch.float32)
    bits = x.detach().contiguous().view(kinds[x.dtype])
    largest = (bits & torch.iinfo(bits.dtype).max).amax()
    return largest.view(x.dtype).float()


def multiplier_for(largest: Tensor) -> Tensor:
    """448 / largest, rounded down to a power of two.

    Args:
        largest: As largest_magnitude gives it.

    Returns:
        One fp32 number: 2^k with the largest k for which largest * 2^k is at most 448 (k at most LARGEST_EXPONENT); 1
        if largest is 0, NaN if it is not finite. Its inverse, the scale, is exact.
    """
    fraction, exponent = torch.frexp(largest)  # largest = fraction * 2^exponent, fraction from 1/2 to below 1
    # 448 = 0.875 * 2^9
    power = (9 - exponent - (fraction > 0.875).int()).clamp(max=LARGEST_EXPONENT)
    multiplier = torch.ldexp(torch.ones_like(largest), power)
    multiplier = torch.where(largest == 0, 1.0, multiplier)
    return torch.where(largest.isfinite(), multiplier, torch.nan)


def quantise(x: Tensor, multiplier: Tensor) -> Tensor:
    """x * multiplier as e4m3: clamped to +-448 and rounded to nearest, ties to even; NaN stays NaN.

    Args:
        x: Any shape; fp32, fp16 or bf16.
        multiplier: One fp32 number. Where it is NaN, so is the result.

    Returns:
        float8_e4m3fn, of x's shape, contiguous.
    """
    return encode(x.float() * multiplier).view(torch.float8_e4m3fn)


def dequantise(quantised: Tensor, scale: Tensor) -> Tensor:
    """The fp32 numbers that e4m3 codes stand for, times scale; exact where scale is a power of two and nothing
    underflows.
    """
    return decode(quantised.view(torch.uint8)) * scale


def encode(values: Tensor) -> Tensor:
    """e4m3 codes (uint8) of fp32 values, any shape; contiguous."""
    values = values.contiguous()
    bits = values.view(torch.int32)
    magnitude = values.abs().clamp(max=LARGEST)  # NaN stays
    whole = magnitude.view(torch.int32)
    normal = (whole + ((1 << _MANTISSA - 1) - 1) + (whole >> _MANTISSA & 1) >> _MANTISSA) - _BIAS
    # The sum rounds to a multiple of 2^-9, to nearest and ties to even.
    small = (magnitude + _SUBNORMAL).view(torch.int32) - _bits_of(_SUBNORMAL)
    code = torch.where(magnitude < _SMALLEST_NORMAL, small, normal)
    code = code | bits >> 24 & 0x80
    return torch.where(values.isnan(), NAN, code).to(torch.uint8)


def encode_at_random(values: Tensor, random: Tensor, bits: int) -> Tensor:
    """e4m3 codes (uint8) of fp32 values, rounded up or down at random, so that their mean is the value.

    A value that lies a fraction f of the way between two neighbouring magnitudes becomes the larger one for as many of
    the 2^bits random numbers as are at least (1 - f) 2^bits - 1/2: with probability f, up to half of 2^-bits. What e4m3
    holds exactly stays. Magnitudes beyond 448 are 448; what is not finite is NaN.

    Args:
        values: Any shape; fp32.
        random: Whole numbers from 0 to 2^bits - 1, of the same shape.
        bits: At most 19.
    """
    size = values.abs().clamp(max=LARGEST)
    # Subnormal e4m3 numbers, and the normal ones from 2^-6 up to 2^-5, are equally far apart: by 2^-9.
    lifted = size < _SMALLEST_NORMAL
    whole = torch.where(lifted, size + _SMALLEST_NORMAL, size).view(torch.int32)
    added = (2 * random.int() + 1) << (_MANTISSA - bits - 1)
    code = ((whole + added) >> _MANTISSA) - torch.where(lifted, _BIAS + 8, _BIAS)
    code = code | values.contiguous().view(torch.int32) >> 24 & 0x80
    return torch.where(values.isfinite(), code, NAN).to(torch.uint8)


def decode(codes: Tensor) -> Tensor:
    """The fp32 numbers of e4m3 codes (uint8), exact."""
    wide = codes.int()
    exponent, mantissa = wide >> 3 & 15, (wide & 7).float()
    normal = torch.ldexp(1 + mantissa / 8, exponent - 7)
    magnitude = torch.where(exponent == 0, mantissa * 2.0**-9, normal)
    magnitude = torch.where((wide & NAN) == NAN, torch.nan, magnitude)
    return torch.where(wide >= 0x80, -magnitude, magnitude)


def _bits_of(value: float) -> int:
    return int(torch.tensor(value, dtype=torch.float32, device="cpu").view(torch.int32))
