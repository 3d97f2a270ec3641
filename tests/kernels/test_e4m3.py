"""The Triton functions of e4m3 against the specification: every 16-bit number, and every boundary of a scale."""

import pytest
import torch
import triton
import triton.language as tl

from semisparse.kernels import e4m3
from semisparse.reference import fp8
from semisparse.testing import assert_bit_equal

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NATIVE = e4m3.native_on(0 if DEVICE == "cuda" else -1)
SIXTEEN = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
PLAIN_AND_NATIVE = pytest.mark.parametrize("native", [False, True] if NATIVE else [False])


@triton.jit
def convert(values, multiplier, single, twos, fours, SIZE: tl.constexpr, NATIVE: tl.constexpr):
    start = tl.program_id(0) * SIZE
    place = start + tl.arange(0, SIZE)
    factor = tl.load(multiplier)
    tl.store(single + place, e4m3.codes(tl.load(values + place) * factor, NATIVE))
    half = start // 2 + tl.arange(0, SIZE // 2)
    two = e4m3.pack_two(tl.load(values + 2 * half) * factor, tl.load(values + 2 * half + 1) * factor, NATIVE)
    tl.store(twos + half, two.to(tl.int16))
    fourth = start // 4 + tl.arange(0, SIZE // 4)
    a, b = tl.load(values + 4 * fourth) * factor, tl.load(values + 4 * fourth + 1) * factor
    c, d = tl.load(values + 4 * fourth + 2) * factor, tl.load(values + 4 * fourth + 3) * factor
    tl.store(fours + fourth, e4m3.pack_four(a, b, c, d, NATIVE))


def converted(values, multiplier, native):
    """The codes of fp32 values times multiplier by all three functions."""
    outs = [torch.zeros(values.numel() // 4, dtype=torch.int32, device=values.device) for _ in range(3)]
    dtypes = torch.uint8, torch.int16, torch.int32
    given = [out.view(dtype) for out, dtype in zip(outs, dtypes, strict=True)]
    factor = torch.tensor(multiplier, device=values.device)
    convert[(values.numel() // 1024,)](values, factor, *given, 1024, native)
    return [out.view(torch.uint8) for out in outs]


def halves():
    """The numbers halfway between neighbouring codes, and the fp32 numbers beside them."""
    numbers = fp8.decode(torch.arange(0x7F, dtype=torch.int32).to(torch.uint8))
    between = (numbers[1:] + numbers[:-1]) / 2
    around = [between.nextafter(torch.tensor(limit)) for limit in (0.0, 1e9)]
    values = torch.cat([between, *around, numbers])
    return torch.nn.functional.pad(torch.cat([values, -values]), (0, 2048 - 2 * len(values)))


VALUES = {
    "every fp16 number": lambda: SIXTEEN.view(torch.float16).float(),
    "every bf16 number": lambda: SIXTEEN.view(torch.bfloat16).float(),
    "fp32 numbers of every size": lambda: torch.randint(-(2**31), 2**31 - 1, (2**16,)).int().view(torch.float32),
    "halfway and beside it": halves,
}


@PLAIN_AND_NATIVE
@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered in multiply")  # numpy's
@pytest.mark.parametrize("multiplier", [1.0, 2.0**-4, 2.0**20, float("nan")])
@pytest.mark.parametrize("make", VALUES.values(), ids=VALUES)
def test_codes_are_those_of_the_specification(make, multiplier, native):
    values = make().to(DEVICE)
    expected = fp8.encode(values * multiplier)
    for found in converted(values, multiplier, native):
        assert_bit_equal(found, expected)


@triton.jit
def scales(largest, multiplier, scale, SIZE: tl.constexpr):
    place = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    factor = e4m3.multiplier_for(tl.load(largest + place))
    tl.store(multiplier + place, factor)
    tl.store(scale + place, e4m3.inverse(factor))


def test_multipliers_and_scales_are_those_of_the_specification():
    bits = [SIXTEEN[: 2**15].int() << 16, (SIXTEEN[: 2**15].int() << 16) | 0xFFFF]  # every exponent; from 0 to a NaN
    bits.append((torch.arange(256, dtype=torch.int32) << 23) + 0x600000)  # 1.75 of every power, and beside it
    bits = torch.cat([*bits, bits[-1] + 1, bits[-1] - 1, torch.zeros(256, dtype=torch.int32)]).to(DEVICE)
    found, scale = (torch.empty(len(bits), device=DEVICE) for _ in range(2))
    scales[(len(bits) // 256,)](bits, found, scale, 256)
    expected = fp8.multiplier_for(bits.view(torch.float32))
    assert_bit_equal(found, expected)
    assert_bit_equal(scale, 1 / expected)


@triton.jit
def largest(words, count, out, WORDS: tl.constexpr):
    tl.store(out, e4m3.largest_word(words, count, WORDS))


@pytest.mark.parametrize("count", [1, 5, 8])
def test_of_the_words_only_those_that_count_are_read(count):
    words = torch.tensor([3, 1, 0, 2, 7, 9, 6, 2**31 - 1], dtype=torch.int32, device=DEVICE)
    out = torch.empty(1, dtype=torch.int32, device=DEVICE)
    largest[(1,)](words, count, out, 8)
    assert out == words[:count].max()
