"""Numerical derivatives in fp64 with a mask that cannot move, first and second order."""

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from semisparse.functional import semi_sparse_activation_linear, semi_sparse_linear
from semisparse.testing import assert_bit_equal
from tests.support import brute_mask, brute_token_mask

SHAPES = [(1, 4, 4), (3, 4, 8), (4, 8, 4), (5, 8, 8), (8, 12, 4), (2, 4, 12)]


def separated(mask: Tensor) -> Tensor:
    """fp64 values whose kept entries are at least 10 times the others, so that small steps leave the mask."""
    values = torch.rand(mask.shape, dtype=torch.float64) + 1
    return torch.where(torch.rand(mask.shape) < 0.5, values, -values) * torch.where(mask, 1.0, 0.05)


def with_kept(base: Tensor, mask: Tensor, kept: Tensor) -> Tensor:
    """base with its kept entries replaced by the vector kept."""
    return base.masked_scatter(mask, kept)


@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("m", "k", "n"), SHAPES)
def test_weight_operand(m: int, k: int, n: int, bias: bool, check) -> None:
    mask = brute_mask(torch.randn(n, k))
    base = separated(mask)
    assert torch.equal(brute_mask(base), mask)
    inputs = [torch.randn(m, k, dtype=torch.float64), base[mask], *([torch.randn(n, dtype=torch.float64)] * bias)]

    def function(x: Tensor, kept: Tensor, *bias: Tensor) -> Tensor:
        return semi_sparse_linear(x, with_kept(base, mask, kept), *bias)

    assert check(function, [tensor.requires_grad_() for tensor in inputs])


@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("m", "k", "n"), SHAPES)
def test_activation_operand(m: int, k: int, n: int, bias: bool, check) -> None:
    mask = brute_token_mask(torch.randn(m, k))
    base = separated(mask)
    assert torch.equal(brute_token_mask(base), mask)
    inputs = [base[mask], torch.randn(n, k, dtype=torch.float64), *([torch.randn(n, dtype=torch.float64)] * bias)]

    def function(kept: Tensor, weight: Tensor, *bias: Tensor) -> Tensor:
        return semi_sparse_activation_linear(with_kept(base, mask, kept), weight, *bias)

    assert check(function, [tensor.requires_grad_() for tensor in inputs])


@pytest.mark.parametrize("function", [semi_sparse_linear, semi_sparse_activation_linear])
def test_double_backward_of_a_gradient_penalty(function) -> None:
    x, weight = torch.randn(8, 8, dtype=torch.float64), torch.randn(12, 8, dtype=torch.float64)

    def penalty(forward, x: Tensor, weight: Tensor) -> list[Tensor]:
        x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
        output = forward(x, weight).tanh().sum()
        first = torch.autograd.grad(output, [x, weight], create_graph=True)
        second = torch.autograd.grad(sum(part.square().sum() for part in first), [x, weight])
        return [*first, *second]

    if function is semi_sparse_linear:
        pruned = x, torch.where(brute_mask(weight), weight, 0)
    else:
        pruned = torch.where(brute_token_mask(x), x, 0), weight
    expected = penalty(torch.nn.functional.linear, *pruned)
    for ours, plain in zip(penalty(function, x, weight), expected, strict=True):
        assert_bit_equal(ours, plain)
