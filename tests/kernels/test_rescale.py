"""The kernel that multiplies by the scales of a product, in Triton's interpreter or on a GPU."""

import pytest
import torch
from torch import Tensor

from semisparse.errors import ShapeError, TensorError
from semisparse.kernels import rescale
from semisparse.ops import rescale_formula
from semisparse.testing import assert_bit_equal

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def scales(first: float, second: float) -> tuple[Tensor, Tensor]:
    return torch.tensor(first, device=DEVICE), torch.tensor(second, device=DEVICE)


@EACH_DTYPE
@pytest.mark.parametrize("given", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 16), (17, 48), (16, 512), (33, 528)], ids=str)
def test_it_is_the_formula(shape: tuple[int, int], with_bias: bool, given: torch.dtype, dtype: torch.dtype) -> None:
    rows, columns = shape
    y = torch.randn(-(-rows // 16) * 16, columns, device=DEVICE).to(given)
    bias = torch.randn(columns, device=DEVICE).to(dtype) if with_bias else None
    out = torch.empty(shape, dtype=dtype, device=DEVICE)
    rescale.launch(y, *scales(2.0**-7, 2.0**9), bias, out)
    assert_bit_equal(out, rescale_formula(y, *scales(2.0**-7, 2.0**9), bias, rows, dtype))


@EACH_DTYPE
def test_in_place(dtype: torch.dtype) -> None:
    y = torch.randn(32, 64, device=DEVICE).to(dtype)
    expected = y.clone()
    expected[:21] = rescale_formula(y, *scales(0.5, 0.125), None, 21, dtype)
    rescale.launch(y, *scales(0.5, 0.125), None, y[:21])
    assert_bit_equal(y, expected)


@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered")  # numpy's
@EACH_DTYPE
def test_what_is_not_finite_or_tiny_is_rounded_as_by_pytorch(dtype: torch.dtype) -> None:
    y = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 3e38, -3e38, 1e-44, 6e4], device=DEVICE)
    y = y.repeat(16, 2)
    for pair in ((2.0, 4.0), (2.0**-3, 2.0**-2), (float("nan"), 1.0), (2.0**-20, 2.0**-10)):
        for bias in (None, torch.full((16,), -1e38, device=DEVICE), torch.zeros(16, device=DEVICE)):
            out = torch.empty(16, 16, dtype=dtype, device=DEVICE)
            rescale.launch(y, *scales(*pair), bias, out)
            assert_bit_equal(out, rescale_formula(y, *scales(*pair), bias, 16, dtype))


def test_bad_arguments_are_named() -> None:
    y, one = torch.zeros(16, 32), torch.ones(())
    for out in (torch.zeros(17, 32), torch.zeros(16, 16)):
        with pytest.raises(ShapeError, match="out must be rows of y"):
            rescale.launch(y, one, one, None, out)
    with pytest.raises(ShapeError, match=r"bias has shape \(16,\)"):
        rescale.launch(y, one, one, torch.zeros(16), torch.zeros(16, 32))
    with pytest.raises(TensorError, match="scale_b is"):
        rescale.launch(y, one, one.double(), None, torch.zeros(16, 32))
    for name, tensors in (
        ("y", (y.mT, None, y.mT)),
        ("bias", (y, torch.zeros(32).int(), y)),
        ("out", (y, None, y.int())),
    ):
        given, bias, out = tensors
        with pytest.raises(TensorError, match=f"{name} is "):
            rescale.launch(given, one, one, bias, out)
