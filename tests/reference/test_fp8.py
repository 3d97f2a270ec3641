"""The specification of e4m3 against brute force: every 16-bit number, every code, every boundary of a scale."""

import pytest
import torch
from torch import Tensor

from semisparse.errors import TensorError
from semisparse.reference import fp8

SIXTEEN = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
CODES = torch.arange(256, dtype=torch.int32).to(torch.uint8)
EACH_DTYPE = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


def value_of(code: int) -> float:
    """What a code stands for, from the definition of the format."""
    sign, exponent, mantissa = -1.0 if code & 0x80 else 1.0, code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    return sign * (mantissa * 2.0**-9 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


POSITIVE = torch.tensor([value_of(code) for code in range(0x7F)], dtype=torch.float64)


def nearest(values: Tensor) -> Tensor:
    """Codes by search among all of them: the nearest, of two equally near ones the even one."""
    magnitude = values.double().abs().clamp(max=448.0)
    upper = torch.searchsorted(POSITIVE, magnitude).clamp(max=len(POSITIVE) - 1)
    lower = (upper - 1).clamp(min=0)
    up, down = POSITIVE[upper] - magnitude, magnitude - POSITIVE[lower]
    code = torch.where((up < down) | ((up == down) & (upper % 2 == 0)), upper, lower)
    code = code + 128 * torch.signbit(values)
    return torch.where(values.isnan(), 0x7F, code).to(torch.uint8)


def test_every_code_is_read_as_the_format_says() -> None:
    found = fp8.decode(CODES)
    expected = torch.tensor([value_of(code) for code in range(256)])
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(torch.signbit(found[128]), torch.tensor(True))
    torch.testing.assert_close(found, CODES.view(torch.float8_e4m3fn).float(), rtol=0, atol=0, equal_nan=True)


def test_every_code_is_written_as_it_was_read() -> None:
    numbers = (CODES & 0x7F) != 0x7F
    assert torch.equal(fp8.encode(fp8.decode(CODES))[numbers], CODES[numbers])
    assert ((fp8.encode(fp8.decode(CODES))[~numbers] & 0x7F) == 0x7F).all()


@EACH_DTYPE
def test_every_16_bit_number_is_rounded_to_the_nearest_code(dtype: torch.dtype) -> None:
    values = SIXTEEN.view(dtype).float()
    assert torch.equal(fp8.encode(values), nearest(values))


def test_halfway_and_its_neighbours_are_rounded_to_even() -> None:
    halves = ((POSITIVE[1:] + POSITIVE[:-1]) / 2).float()
    values = torch.cat([halves, halves.nextafter(torch.tensor(0.0)), halves.nextafter(torch.tensor(1e9))])
    values = torch.cat([values, -values])
    assert torch.equal(fp8.encode(values), nearest(values))


def test_random_fp32_numbers_of_every_size() -> None:
    values = torch.randint(-(2**31), 2**31 - 1, (1_000_000,), generator=torch.Generator().manual_seed(0)).int()
    assert torch.equal(fp8.encode(values.view(torch.float32)), nearest(values.view(torch.float32)))


def test_it_is_torchs_cast_for_numbers_up_to_448() -> None:
    values = SIXTEEN.view(torch.bfloat16).float()
    values = values[values.abs() <= 448]
    assert torch.equal(fp8.encode(values), values.to(torch.float8_e4m3fn).view(torch.uint8))


def test_what_is_too_large_becomes_448_and_nan_stays() -> None:
    values = torch.tensor([448.0, 449.0, 1e30, float("inf"), -float("inf"), float("nan"), -float("nan"), -0.0])
    found = fp8.decode(fp8.encode(values))
    assert found[:5].tolist() == [448.0] * 4 + [-448.0]
    assert found[5:7].isnan().all() and torch.signbit(found[7])


# ---- scales


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_largest_magnitude_counts_nan_above_inf_above_numbers(dtype: torch.dtype) -> None:
    x = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert fp8.largest_magnitude(x) == x.abs().max().float()
    assert fp8.largest_magnitude(x.mT) == fp8.largest_magnitude(x)
    x[1, 2] = -float("inf")
    assert fp8.largest_magnitude(x) == float("inf")
    x[3, 3] = float("nan")
    assert fp8.largest_magnitude(x).isnan()
    for size in (0, 3):
        assert fp8.largest_magnitude(torch.zeros(size, 4, dtype=dtype)) == 0
    assert fp8.largest_magnitude(torch.tensor([-0.0], dtype=dtype)) == 0
    smallest = torch.tensor([1], dtype=torch.int16 if dtype.itemsize == 2 else torch.int32).view(dtype)
    assert fp8.largest_magnitude(-smallest) == smallest.float()


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(TensorError, match=r"x is torch\.float64"):
        fp8.largest_magnitude(torch.zeros(3, dtype=torch.float64))


@EACH_DTYPE
def test_the_multiplier_is_the_largest_power_of_two_that_fits(dtype: torch.dtype) -> None:
    sizes = SIXTEEN.view(dtype)
    sizes = sizes[sizes.isfinite() & (sizes > 0)].float()
    found = fp8.multiplier_for(sizes).double()
    assert ((found.log2() % 1) == 0).all()
    assert (sizes.double() * found <= 448).all()
    limited = found == 2.0**fp8.LARGEST_EXPONENT
    assert (sizes.double() * found * 2 > 448)[~limited].all()
    assert (1 / found.float()).isfinite().all() and (found.float() * (1 / found.float()) == 1).all()


def test_multipliers_at_the_boundaries() -> None:
    largest = torch.tensor([448.0, 448.00003, 447.9, 1.0, 1.75, 1.7500001, 3.4e38, 2.0**-149, 2.0**-118, 0.0])
    expected = [1.0, 0.5, 1.0, 256.0, 256.0, 128.0, 2.0**-120, 2.0**126, 2.0**126, 1.0]
    assert fp8.multiplier_for(largest).tolist() == expected
    assert fp8.multiplier_for(torch.tensor([float("inf"), float("nan")])).isnan().all()


@EACH_DTYPE
def test_what_is_quantised_is_read_back_within_half_a_unit(dtype: torch.dtype) -> None:
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(1)).to(dtype) * 37
    multiplier = fp8.multiplier_for(fp8.largest_magnitude(x))
    back = fp8.dequantise(fp8.quantise(x, multiplier), 1 / multiplier)
    normal = x.float().abs() * multiplier >= 2.0**-6
    error = (back - x.float()).abs()
    assert (error <= x.float().abs() / 16)[normal].all()
    assert (error <= 2.0**-10 / multiplier)[~normal].all()


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_tensor_that_is_not_finite_becomes_nan_throughout(bad: float) -> None:
    x = torch.ones(4, 4)
    x[2, 1] = bad
    multiplier = fp8.multiplier_for(fp8.largest_magnitude(x))
    assert fp8.dequantise(fp8.quantise(x, multiplier), 1 / multiplier).isnan().all()


def test_codes_do_not_depend_on_the_default_dtype() -> None:
    expected = fp8.encode(POSITIVE.float())
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(fp8.encode(POSITIVE.float()), expected)
    finally:
        torch.set_default_dtype(torch.float32)
