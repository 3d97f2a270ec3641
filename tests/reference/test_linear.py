"""The written equations against autograd, on whole numbers so that equality is exact."""

import math

import pytest
import torch
import torch.nn.functional as F

from semisparse.errors import ShapeError, TensorError
from semisparse.reference import linear, masks
from semisparse.testing import DTYPES, assert_as_good_as_torch, assert_bit_equal, small_integers
from tests.support import brute_mask, brute_token_mask

pytestmark = pytest.mark.usefixtures("poison")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
def test_weight_operand_equals_autograd(with_bias: bool, dtype: torch.dtype) -> None:
    x, weight = small_integers((6, 12), seed=1, dtype=dtype), small_integers((8, 12), seed=2, dtype=dtype)
    bias = small_integers((8,), seed=3, dtype=dtype) if with_bias else None
    grad_output = small_integers((6, 8), seed=4, dtype=dtype)
    pruned = linear.prune(weight, masks.transposable(weight))
    leaves = [x.clone().requires_grad_(), torch.where(brute_mask(weight), weight, 0).requires_grad_()]
    if bias is not None:
        leaves.append(bias.clone().requires_grad_())
    y = F.linear(*leaves)
    grads = torch.autograd.grad(y, leaves, grad_output)
    assert_bit_equal(linear.forward(x, pruned, bias), y)
    assert_bit_equal(linear.grad_input(grad_output, pruned), grads[0])
    assert_bit_equal(linear.grad_weight(grad_output, x), grads[1])
    if bias is not None:
        assert_bit_equal(linear.grad_bias(grad_output), grads[2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 6, 8])
def test_activation_operand_equals_autograd(tokens: int, dtype: torch.dtype) -> None:
    x, weight = small_integers((tokens, 12), seed=1, dtype=dtype), small_integers((8, 12), seed=2, dtype=dtype)
    grad_output = small_integers((tokens, 8), seed=4, dtype=dtype)
    pruned = linear.prune_tokens(x)
    leaves = [torch.where(brute_token_mask(x), x, 0).requires_grad_(), weight.clone().requires_grad_()]
    y = F.linear(*leaves)
    grads = torch.autograd.grad(y, leaves, grad_output)
    assert_bit_equal(pruned, leaves[0].detach() + 0)
    assert_bit_equal(linear.forward(pruned, weight), y)
    assert_bit_equal(linear.grad_input(grad_output, weight), grads[0])
    assert_bit_equal(linear.grad_weight(grad_output, pruned), grads[1])


@pytest.mark.parametrize("tokens", range(10))
def test_padding_adds_zero_rows_up_to_a_multiple_of_four(tokens: int) -> None:
    x = torch.randn(tokens, 8)
    padded = linear.pad_tokens(x)
    assert padded.shape[0] == (tokens + 3) // 4 * 4
    assert torch.equal(padded[:tokens], x)
    assert not padded[tokens:].any()
    assert linear.prune_tokens(x).shape == x.shape


def test_a_pruned_inf_or_nan_becomes_zero() -> None:
    matrix = torch.tensor([[float("inf"), float("nan"), -1.0, 2.0]])
    pruned = linear.prune(matrix, torch.tensor([[False, False, True, False]]))
    assert_bit_equal(pruned, torch.tensor([[0.0, 0.0, -1.0, 0.0]]))


def shrunk_group(group: list[float], scale: float) -> list[float]:
    """The definition of the soft threshold, entry by entry in Python's fp64, for four numbers of distinct size."""
    sizes = sorted(abs(entry) for entry in group)
    return [math.copysign(max(abs(a) - sizes[1], 0.0), a) * scale if abs(a) >= sizes[2] else 0.0 for a in group]


@pytest.mark.parametrize("scale", [1.0, 0.75, torch.tensor(1.25)], ids=str)
def test_the_soft_threshold_is_its_formula(scale: torch.Tensor | float) -> None:
    matrix = torch.randn(12, 20, dtype=torch.float64)
    groups = [shrunk_group(group, float(scale)) for group in matrix.view(-1, 4).tolist()]
    expected = torch.tensor(groups, dtype=torch.float64).view(12, 20)
    assert_bit_equal(linear.soft_threshold(matrix, scale) + 0, expected + 0)
    # Quarters between -7.25 and 6.75, no two of one size: exact in every dtype.
    coarse = torch.stack([torch.randperm(15)[:4] - 7.25 for _ in range(200)]).view(40, 20).double()
    expected = torch.tensor([shrunk_group(group, float(scale)) for group in coarse.view(-1, 4).tolist()]).view(40, 20)
    for dtype in DTYPES:
        assert_bit_equal(linear.soft_threshold(coarse.to(dtype), scale), expected.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_soft_threshold_prunes_without_a_jump(dtype: torch.dtype) -> None:
    # The second entry sinks through the third, step by step, and the mask changes on the way.
    sinking = torch.linspace(1.5, 0.5, 65).to(dtype)
    matrix = torch.stack([torch.full_like(sinking, fill) for fill in (2.0, 1.0, -1.0, 0.25)], dim=-1)
    matrix[:, 1] = sinking
    kept, soft = masks.row(matrix), linear.soft_threshold(matrix, 1.0)
    assert set(kept[:, 1].tolist()) == {True, False}
    steps = (soft[1:] - soft[:-1]).double().abs()
    assert steps.max() <= (sinking[:-1] - sinking[1:]).double().max()
    hard = linear.prune(matrix, kept)
    assert (hard[1:] - hard[:-1]).double().abs().max() >= 1


def test_a_tie_with_the_threshold_shrinks_to_positive_zero() -> None:
    matrix = torch.tensor([[-3.0, -3.0, 3.0, 1.0], [-2.0, 5.0, 2.0, -2.0], [0.0, -0.0, -0.0, 0.0]])
    expected = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, 3.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    assert_bit_equal(linear.soft_threshold(matrix, 1.0), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_soft_threshold_keeps_a_nan_and_drops_what_it_prunes(dtype: torch.dtype) -> None:
    nan, inf = float("nan"), float("inf")
    matrix = torch.tensor([[1.0, nan, -4.0, 2.0], [3.0, -inf, 1.0, 2.0], [nan, -nan, nan, inf], [inf, inf, inf, 1.0]])
    expected = torch.tensor([[0.0, nan, -2.0, 0.0], [1.0, -inf, 0.0, 0.0], [nan, nan, 0.0, 0.0], [nan, nan, 0.0, 0.0]])
    assert_bit_equal(linear.soft_threshold(matrix.to(dtype), 1.0), expected.to(dtype))


def test_the_soft_threshold_needs_groups_of_four_and_floats() -> None:
    with pytest.raises(ShapeError, match="multiple of 4"):
        linear.soft_threshold(torch.ones(4, 6), 1.0)
    with pytest.raises(TensorError, match="int64"):
        linear.soft_threshold(torch.ones(4, 8, dtype=torch.int64), 1.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_soft_scale_is_the_least_squares_fit(dtype: torch.dtype) -> None:
    weight = torch.randn(32, 48).to(dtype)
    scale = linear.soft_scale(weight)
    assert (scale.dtype, scale.shape) == (torch.float32, torch.Size([]))
    wide = weight.double()
    shrunk = linear.soft_threshold(wide, 1.0)
    fitted = torch.linalg.lstsq(shrunk.view(-1, 1), wide.view(-1, 1)).solution.squeeze()
    assert_as_good_as_torch(scale, fitted.float(), fitted)
    best = (wide - scale.double() * shrunk).square().sum()
    for other in (0.99, 1.01):
        assert best < (wide - other * scale.double() * shrunk).square().sum()


def test_the_soft_scale_of_nothing_is_one() -> None:
    for weight in (torch.zeros(4, 8), torch.ones(4, 8), torch.zeros(0, 8)):  # of equal entries none is left over
        assert_bit_equal(linear.soft_scale(weight), torch.tensor(1.0))
