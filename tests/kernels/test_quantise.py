"""The kernel that rounds to e4m3 against the specification, in Triton's interpreter or on a GPU."""

import pytest
import torch
from torch import Tensor

from semisparse.errors import ConfigError, ShapeError, TensorError
from semisparse.kernels import amax, quantise
from semisparse.reference import fp8
from semisparse.testing import assert_bit_equal

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
SHAPES = [(1, 32), (13, 96), (50, 352), (16, 16), (quantise.BLOCK.fours * 8, quantise.BLOCK.columns * 2)]
NUMBERS = torch.arange(2**16, dtype=torch.int32).to(torch.int16)


def quantised(x: Tensor, rows: bool = True, columns: bool = True) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """By the kernels, as bytes. What is not written would be 99."""
    partials = torch.empty(amax.programs_for(x), dtype=torch.int32, device=DEVICE)
    amax.launch(x, partials)
    padded, features = -(-x.shape[0] // 16) * 16, x.shape[1]
    x8 = torch.full((padded, features), 99, dtype=torch.uint8, device=DEVICE) if rows else None
    x8t = torch.full((features, padded), 99, dtype=torch.uint8, device=DEVICE) if columns else None
    scale = torch.empty((), device=DEVICE)
    quantise.launch(x, partials, x8, x8t, scale)
    return x8, x8t, scale


def assert_as_specified(x: Tensor) -> None:
    multiplier = fp8.multiplier_for(fp8.largest_magnitude(x))
    codes = fp8.quantise(x, multiplier).view(torch.uint8)
    codes = torch.cat([codes, codes.new_zeros(-x.shape[0] % 16, x.shape[1])])
    for rows, columns in ((True, True), (True, False), (False, True)):
        x8, x8t, scale = quantised(x, rows, columns)
        assert (x8 is not None, x8t is not None) == (rows, columns)
        if x8 is not None:
            assert_bit_equal(x8, codes)
        if x8t is not None:
            assert_bit_equal(x8t, codes.mT)
        assert_bit_equal(scale, 1 / multiplier)


@EACH_DTYPE
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_and_scale_are_the_specification(shape: tuple[int, int], dtype: torch.dtype) -> None:
    assert_as_specified((torch.randn(shape, device=DEVICE) * torch.randn(shape[1], device=DEVICE).exp()).to(dtype))


@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered in multiply")  # numpy's
@pytest.mark.parametrize("limit", [float("nan"), 1e38, 448.0, 449.0, 2e-3, 1e-30])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_16_bit_number_is_rounded_as_specified(dtype: torch.dtype, limit: float) -> None:
    numbers = NUMBERS.to(DEVICE).view(dtype).view(256, 256)
    assert_as_specified(numbers if limit != limit else torch.where(numbers.float().abs() <= limit, numbers, 0))


SPECIAL = {
    "zeros": lambda x: torch.zeros_like(x),
    "subnormal": lambda x: x * 1e-41,
    "small": lambda x: x * 2.0**-110,
    "large": lambda x: x * 2.0**120,
    "NaN": lambda x: x.index_fill(1, torch.tensor([5], device=DEVICE), float("nan")),
    "Inf": lambda x: x.index_fill(1, torch.tensor([5], device=DEVICE), -float("inf")),
    "negative zeros": lambda x: -torch.zeros_like(x),
}


@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered in multiply")  # numpy's
@pytest.mark.parametrize("change", SPECIAL.values(), ids=SPECIAL)
def test_special_values(change) -> None:
    assert_as_specified(change(torch.randn(13, 32, device=DEVICE)))


def test_what_lies_between_rows_is_not_read() -> None:
    wide = torch.full((20, 96), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    x = wide[:13, 32:64]
    x.copy_(torch.randn(13, 32))
    assert_as_specified(x)


def test_a_part_is_rounded_with_the_scale_of_the_whole() -> None:
    whole = torch.randn(32, 64, device=DEVICE)
    whole[20, 3] = 1000
    partials = torch.empty(amax.programs_for(whole), dtype=torch.int32, device=DEVICE)
    amax.launch(whole, partials)
    x8, scale = torch.empty(16, 64, dtype=torch.uint8, device=DEVICE), torch.empty((), device=DEVICE)
    quantise.launch(whole[:16], partials, x8, None, scale)
    multiplier = fp8.multiplier_for(fp8.largest_magnitude(whole))
    assert_bit_equal(x8, fp8.quantise(whole[:16], multiplier).view(torch.uint8))
    assert_bit_equal(scale, 1 / multiplier)


def test_bad_arguments_are_named() -> None:
    x, partials = torch.zeros(13, 32), torch.zeros(1, dtype=torch.int32)
    x8, x8t, scale = torch.empty(16, 32, dtype=torch.uint8), torch.empty(32, 16, dtype=torch.uint8), torch.empty(())
    with pytest.raises(ConfigError, match="both None"):
        quantise.launch(x, partials, None, None, scale)
    for name, given in (("x8", (x8[:13], None)), ("x8t", (None, x8)), ("x8t", (x8, x8.mT)), ("x8", (x8.int(), None))):
        with pytest.raises(ShapeError, match=f"{name} is "):
            quantise.launch(x, partials, *given, scale)
    with pytest.raises(TensorError, match="scale is"):
        quantise.launch(x, partials, x8, x8t, torch.empty((), dtype=torch.float64))
    with pytest.raises(TensorError, match="multiples of 16 bytes"):
        quantise.launch(x8t.float().mT, partials, x8, x8t, scale)
    with pytest.raises(TensorError, match="partials is"):
        quantise.launch(x, scale, x8, x8t, scale)
