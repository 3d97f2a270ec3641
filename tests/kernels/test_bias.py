"""The bias kernel, in Triton's interpreter or on a GPU."""

import pytest
import torch

from semisparse.errors import ShapeError, TensorError
from semisparse.kernels import bias as kernel
from semisparse.testing import assert_bit_equal, small_integers

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("shape", [(1, 16), (17, 48), (16, 512), (33, 528)], ids=str)
def test_it_adds_as_pytorch_does(dtype, shape):
    matrix, bias = (torch.randn(size, device=DEVICE).to(dtype) for size in (shape, shape[1]))
    if DEVICE == "cpu" and dtype == torch.bfloat16:  # the interpreter truncates to bf16; integers need no rounding
        matrix, bias = (small_integers(size, seed=1, dtype=dtype) for size in (shape, shape[1:]))
    expected = matrix + bias
    kernel.launch(matrix, bias)
    assert_bit_equal(matrix, expected)


def test_bad_arguments_are_named():
    matrix = torch.zeros(4, 16, dtype=torch.float16)
    with pytest.raises(ShapeError, match=r"bias has shape \(8,\)"):
        kernel.launch(matrix, torch.zeros(8, dtype=torch.float16))
    with pytest.raises(TensorError, match="bfloat16"):
        kernel.launch(matrix, torch.zeros(16, dtype=torch.bfloat16))
    with pytest.raises(TensorError, match="contiguous"):
        kernel.launch(matrix.mT, torch.zeros(4, dtype=torch.float16))
