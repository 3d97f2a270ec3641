"""Kept values side by side, and back, bit for bit, for values of every size."""

import pytest
import torch

from semisparse.errors import ShapeError, TensorError
from semisparse.integrations.fsdp import wire
from semisparse.kernels import kept_values
from semisparse.reference import masks

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("choose", [masks.transposable, masks.row])
@pytest.mark.parametrize("shape", [(4, 4), (36, 264)], ids=str)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_both_ways_move_bits(dtype, shape, choose):
    matrix = torch.randn(shape, device=DEVICE)
    matrix[0, :3] = torch.tensor([float("inf"), float("nan"), -0.0], device=DEVICE)
    kept = choose(matrix)
    codes = masks.to_codes(kept).to(torch.int16)
    matrix = torch.randint(0, 256, shape, dtype=dtype, device=DEVICE) if dtype is torch.uint8 else matrix.to(dtype)
    values = matrix.new_full((shape[0], shape[1] // 2), 7)
    kept_values.keep_values(matrix, codes, values)
    assert torch.equal(values.view(torch.uint8), matrix[kept].view(values.shape).view(torch.uint8))
    back = torch.full_like(matrix, 7)
    kept_values.spread_values(values, codes, back)
    assert torch.equal(back.view(torch.uint8), torch.where(kept, matrix, 0).view(torch.uint8))


def test_plain_pytorch_does_the_same():
    matrix = torch.randn(12, 20)
    codes = masks.to_codes(masks.transposable(matrix)).to(torch.int16)
    values, back = matrix.new_empty(12, 10), torch.full_like(matrix, 7)
    kept_values.keep_values(matrix.to(DEVICE), codes.to(DEVICE), values := values.to(DEVICE))
    assert torch.equal(wire.keep(matrix, codes), values.cpu())
    wire.spread(values.cpu(), codes, back)
    assert torch.equal(back, torch.where(masks.from_codes(codes), matrix, 0))


def test_bad_arguments_are_named():
    matrix, codes = torch.zeros(8, 8, device=DEVICE), torch.full((2, 2), 0x3333, dtype=torch.int16, device=DEVICE)
    values = torch.zeros(8, 4, device=DEVICE)
    with pytest.raises(TensorError, match=r"values torch\.float16"):
        kept_values.keep_values(matrix, codes, values.half())
    with pytest.raises(TensorError, match=r"codes torch\.int32"):
        kept_values.keep_values(matrix, codes.int(), values)
    with pytest.raises(TensorError, match="contiguous"):
        kept_values.spread_values(values, codes, matrix.T)
    with pytest.raises(ShapeError, match=r"matrix is 8 x 8, codes \(2, 2\), values \(8, 2\)"):
        kept_values.spread_values(values[:, :2].contiguous(), codes, matrix)
    with pytest.raises(ShapeError, match=r"codes \(1, 2\)"):
        kept_values.keep_values(matrix, codes[:1], values)
