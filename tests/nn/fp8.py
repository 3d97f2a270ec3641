"""What the tests of fp8 layers share: layers with whole numbers, and the equations' results."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from semisparse import SemiSparseLinear, SparseConfig
from semisparse.reference import linear as reference
from semisparse.reference import mvue_fp8
from semisparse.reference.masks import from_codes
from semisparse.testing import assert_bit_equal, small_integers

K, N = 64, 96
MASKS = ["transposable", "row", "greedy", None]
LIMIT = 20
"""Whole numbers up to here: 17 and 19 are rounded by e4m3; sums over 64 products are below 2^13, exact on any GPU.

Hopper's tensor cores hold sums of fp8 products with 13 bits after the leading one, and cut off the rest.
"""


class Fp8Result(NamedTuple):
    """Output and gradients."""

    output: Tensor
    grad_input: Tensor
    grad_weight: Tensor
    grad_bias: Tensor | None


def fp8_layer(
    mask: str | None = "transposable", dtype: torch.dtype = torch.bfloat16, bias: bool = True, **config: Any
) -> SemiSparseLinear:
    """A layer of whole numbers."""
    settings = SparseConfig(weight=mask, precision="fp8", **config)  # type: ignore[arg-type]
    layer = SemiSparseLinear(K, N, bias=bias, dtype=dtype, config=settings)
    with torch.no_grad():
        for seed, parameter in enumerate(layer.parameters()):
            parameter.copy_(small_integers(parameter.shape, seed=seed, limit=LIMIT))
    return layer


def fp8_inputs(*leading: int, dtype: torch.dtype = torch.bfloat16, grad_dtype: torch.dtype | None = None) -> Any:
    """x and dy of whole numbers; those of dy are small, so that sums over them are exact in any order."""
    x = small_integers((*leading, K), seed=7, limit=LIMIT, dtype=dtype)
    return x, small_integers((*leading, N), seed=8, limit=2, dtype=grad_dtype or dtype)


def run(layer: nn.Module, x: Tensor, gradient: Tensor, call: Callable[..., Any] | None = None) -> Fp8Result:
    """What training sees."""
    layer.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    y = (layer if call is None else call)(x)
    y.backward(gradient)
    assert x.grad is not None
    return Fp8Result(y.detach(), x.grad, layer.weight.grad, None if layer.bias is None else layer.bias.grad)


def by_equations(layer: SemiSparseLinear, x: Tensor, gradient: Tensor, *, dense: bool = False) -> Fp8Result:
    """The same by reference/linear.py."""
    weight, bias = layer.weight.detach(), None if layer.bias is None else layer.bias.detach()
    mask = None
    if layer.has_mask and not dense:
        mask = layer.chosen_mask() if layer.held_codes is None else from_codes(layer.held_codes)
    tokens, dy = x.reshape(-1, K), gradient.reshape(-1, N)
    y = reference.fp8_forward(tokens, weight, mask, bias, dy.dtype)
    both_ways = mask is not None and layer.sparse_config.products["grad_input"] == "sparse fp8"
    dx = reference.fp8_grad_input(dy, weight, mask, x.dtype, sparse=both_ways)
    dw = reference.fp8_grad_weight(dy, tokens, weight.dtype)
    if layer.sparse_config.grad_output is not None and not dense:
        seed = 0 if layer.held_seed is None else int(layer.held_seed)
        dw = mvue_fp8.grad_weight(dy, tokens, weight.dtype, seed)
    db = None if bias is None else dy.double().sum(0).to(bias.dtype)
    return Fp8Result(y.view(gradient.shape), dx.view(x.shape), dw, db)


def assert_results_equal(ours: Fp8Result, expected: Fp8Result) -> None:
    """Bit for bit, but for the sign of zeros."""
    for one, other in zip(ours, expected, strict=True):
        if one is None or other is None:
            assert one is other
        else:
            assert_bit_equal(one + 0.0, other + 0.0)
