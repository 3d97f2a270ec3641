"""The written equations against autograd, on whole numbers so that equality is exact."""

import pytest
import torch
import torch.nn.functional as F

from semisparse.reference import linear, masks
from semisparse.testing import DTYPES, assert_bit_equal, small_integers
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
