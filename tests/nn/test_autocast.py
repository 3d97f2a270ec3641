"""Autocast: masks from the stored dtype, products in the autocast dtype, gradients in the parameter's dtype."""

import pytest
import torch
import torch.nn.functional as F

from semisparse import SemiSparseActivationLinear, SemiSparseLinear
from semisparse.testing import assert_bit_equal
from tests.support import LAYER_CLASSES, brute_mask, brute_token_mask, make_layer

pytestmark = pytest.mark.usefixtures("poison")

K, N = 16, 12


def near_ties(*shape: int) -> torch.Tensor:
    """Values that differ in fp32 and are all equal in bf16 and fp16, so a mask shows which dtype it was chosen from."""
    return 1 + torch.rand(shape) * 2.0**-12


@pytest.mark.parametrize("layer_class", LAYER_CLASSES, ids=lambda cls: cls.operand)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_fp32_master_weights(layer_class: type, dtype: torch.dtype, bias: bool) -> None:
    layer = make_layer(layer_class, near_ties(N, K), torch.randn(N) if bias else None)
    x = near_ties(7, K).requires_grad_()
    grad = torch.randn(7, N).to(dtype)
    weight, tokens = layer.weight.detach(), x.detach()
    if layer_class is SemiSparseLinear:
        assert not torch.equal(brute_mask(weight), brute_mask(weight.to(dtype)))
        weight = torch.where(brute_mask(weight), weight, 0)
    else:
        tokens = torch.where(brute_token_mask(tokens), tokens, 0)
    leaves = [leaf.clone().requires_grad_() for leaf in (tokens, weight)]
    bias_leaf = None if layer.bias is None else layer.bias.detach().clone().requires_grad_()
    with torch.autocast("cpu", dtype):
        output, expected = layer(x), F.linear(*leaves, bias_leaf)
    output.backward(grad)
    expected.backward(grad)
    assert output.dtype == dtype
    assert_bit_equal(output, expected)
    for ours, plain in ((x, leaves[0]), (layer.weight, leaves[1]), (layer.bias, bias_leaf)):
        if ours is not None:
            assert ours.grad.dtype == torch.float32
            assert_bit_equal(ours.grad, plain.grad)


def test_the_mask_of_a_bf16_input_comes_from_bf16() -> None:
    identity = make_layer(SemiSparseActivationLinear, torch.eye(K), None)
    x = torch.randn(8, K).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert_bit_equal(identity(x), torch.where(brute_token_mask(x), x, 0))


@pytest.mark.parametrize("layer_class", LAYER_CLASSES, ids=lambda cls: cls.operand)
def test_fp64_is_left_alone_by_autocast(layer_class: type) -> None:
    layer = make_layer(layer_class, torch.randn(N, K).double(), torch.randn(N).double())
    x = torch.randn(8, K).double()
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x)
    assert_bit_equal(output, expected)


def test_a_weight_changed_inside_one_autocast_block_is_seen() -> None:
    # Autocast keeps its casts of leaf parameters until the block ends (nn.Linear goes stale); a pruned cast must not.
    layer = make_layer(SemiSparseLinear, torch.randn(N, K), None)
    x, new = torch.randn(8, K), torch.randn(N, K)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x)
        with torch.no_grad():
            layer.weight.copy_(new)
        output = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert_bit_equal(output, make_layer(SemiSparseLinear, new, None)(x))


@pytest.mark.parametrize("layer_class", LAYER_CLASSES, ids=lambda cls: cls.operand)
def test_a_dense_phase_under_autocast_is_nn_linear(layer_class: type) -> None:
    layer = make_layer(layer_class, torch.randn(N, K), torch.randn(N))
    layer.sparse_enabled = False
    x = torch.randn(7, K)
    with torch.autocast("cpu", torch.bfloat16):
        assert_bit_equal(layer(x), F.linear(x, layer.weight, layer.bias))
