"""The packed route, run on the CPU: its ops have a CPU implementation, only the choice of route is forced here."""

import pytest
import torch

import semisparse
from semisparse import SemiSparseActivationLinear, SemiSparseLinear, ops
from semisparse.errors import EngineError
from semisparse.testing import assert_bit_equal, small_integers
from tests.functional.counting import CountOps
from tests.support import config_of

LAYERS = {"weight": SemiSparseLinear, "activation": SemiSparseActivationLinear}
CASES = [
    ("activation", "transposable"),
    *(("weight", mask) for mask in ("transposable", "row", "greedy", "signed_greedy", "soft", "codes")),
]


def layer_of(operand, mask="transposable", backend="auto", dtype=torch.bfloat16):
    """mask "codes": tile codes of another matrix are held."""
    config = config_of(operand, mask="transposable" if mask == "codes" else mask, backend=backend)
    layer = LAYERS[operand](48, 80, dtype=dtype, config=config)
    with torch.no_grad():
        for seed, parameter in enumerate(layer.parameters()):
            parameter.copy_(small_integers(parameter.shape, seed=seed, dtype=dtype))
    if mask == "codes":
        layer.hold(codes=ops.tile_codes(small_integers((80, 48), seed=9), "transposable"))
    elif mask == "soft":
        layer.hold(scale=torch.tensor(0.5))
    return layer


def results(layer, x, grad, call=None):
    layer.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    y = (layer if call is None else call)(x)  # a compiled module has no truth value
    y.backward(grad)
    return [y.detach(), x.grad, layer.weight.grad, layer.bias.grad]


@pytest.mark.parametrize(("operand", "mask"), CASES)
@pytest.mark.parametrize("leading", [(0,), (1,), (13,), (2, 8), ()], ids=str)
def test_packed_and_masked_dense_give_the_same_bits_on_integers(packed_on_cpu, operand, mask, leading):
    x = small_integers((*leading, 48), seed=7, dtype=torch.bfloat16)
    grad = small_integers((*leading, 80), seed=8, dtype=torch.bfloat16)
    with CountOps() as counter:
        ours = results(layer_of(operand, mask), x, grad)
    assert counter.counts["pack_linear"] + counter.counts["pack_tokens"] == 1
    for result, expected in zip(ours, results(layer_of(operand, mask, "dense"), x, grad), strict=True):
        assert_bit_equal(result + 0.0, expected + 0.0)  # the sign of a zero depends on the order of summation


@pytest.mark.parametrize(("operand", "mask"), CASES)
def test_fp32_parameters_under_autocast(packed_on_cpu, operand, mask):
    layer = layer_of(operand, mask, dtype=torch.float32)
    x, grad = small_integers((12, 48), seed=7), small_integers((12, 80), seed=8)
    with torch.autocast("cpu", torch.bfloat16):
        ours = results(layer, x, grad.bfloat16())
        expected = results(layer_of(operand, mask, "dense", torch.float32), x, grad.bfloat16())
    assert [t.dtype for t in ours] == [torch.bfloat16, torch.float32, torch.float32, torch.float32]
    for result, dense in zip(ours, expected, strict=True):
        assert_bit_equal(result + 0.0, dense + 0.0)


# Dynamo instantiates autograd.Function and records the warning, which the suite's "error" turns into a failure.
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(("operand", "mask"), CASES)
def test_compiled_without_graph_breaks(packed_on_cpu, operand, mask):
    layer = layer_of(operand, mask)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = small_integers((12, 48), seed=7, dtype=torch.bfloat16)
    grad = small_integers((12, 80), seed=8, dtype=torch.bfloat16)
    for ours, expected in zip(results(layer, x, grad, compiled), results(layer, x, grad), strict=True):
        assert_bit_equal(ours, expected)


@pytest.mark.parametrize(("operand", "mask"), CASES)
def test_only_what_the_backward_needs_is_kept(packed_on_cpu, operand, mask):
    layer, x = layer_of(operand, mask), torch.randn(16, 48, dtype=torch.bfloat16, requires_grad=True)
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x)
    buffers = [tensor for tensor in kept if tensor.dtype == torch.uint8]
    assert len(buffers) == 1
    frozen = layer.requires_grad_(False)
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        frozen(x)
    dense = [tensor for tensor in kept if tensor.dtype != torch.uint8]
    assert (operand == "weight" and not dense) or (operand == "activation" and len(kept) == 1)


@pytest.mark.parametrize("operand", LAYERS)
def test_a_double_backward_raises(packed_on_cpu, operand):
    layer, x = layer_of(operand), torch.randn(16, 48, dtype=torch.bfloat16, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x).float().square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_reuse_packs_once_for_eight_micro_batches(packed_on_cpu):
    model = torch.nn.Sequential(layer_of("weight"), torch.nn.Linear(80, 48, dtype=torch.bfloat16))
    x = torch.randn(16, 48, dtype=torch.bfloat16)
    expected = model(x)
    with CountOps() as counter, semisparse.reuse_packed(model) as count:
        for _ in range(8):
            y = model(x)
            y.sum().backward()
    assert count == 1 and counter.counts["pack"] == 1
    assert_bit_equal(y.detach(), expected.detach())
    with torch.no_grad():
        model[0].weight.neg_()
    with CountOps() as counter:
        after = model(x)
    assert counter.counts["pack_linear"] == 1  # outside the block every forward sees the current weight
    assert not torch.equal(after, y)
    with semisparse.reuse_packed(model):
        assert_bit_equal(model(x).detach(), after.detach())  # the kept buffers hold the new weight


@pytest.mark.parametrize("mask", ["greedy", "signed_greedy", "soft", "codes"])
def test_reuse_packs_what_a_recipe_holds(packed_on_cpu, mask):
    layer = layer_of("weight", mask)
    x = small_integers((16, 48), seed=7, dtype=torch.bfloat16)
    expected = layer(x)
    for block in range(2):  # the second block writes into the buffers of the first
        with CountOps() as counter, semisparse.reuse_packed(layer) as count:
            ours = [layer(x).detach() for _ in range(3)]
        assert count == 1 and counter.counts["pack"] == 1
        for y in ours:
            assert_bit_equal(y, expected.detach())
        if layer.holds:  # refreshed in place between blocks, as a recipe does
            before = expected
            other = ops.tile_codes(small_integers((80, 48), seed=10 + block), "transposable")
            if mask == "codes":
                layer.held_codes.copy_(other)
            else:
                layer.held_scale.fill_(block + 2.0)
            expected = layer(x)
            assert not torch.equal(expected, before)


def test_reuse_leaves_the_masked_dense_route_alone():
    layer = SemiSparseLinear(48, 80)
    with semisparse.reuse_packed(layer) as count:
        assert count == 0 and layer(torch.randn(4, 48)).shape == (4, 80)


def test_a_layer_inside_a_block_has_the_same_state_dict(packed_on_cpu):
    layer = layer_of("weight")
    with semisparse.reuse_packed(layer):
        assert list(layer.state_dict()) == ["weight", "bias"]


@pytest.mark.parametrize("operand", LAYERS)
def test_cusparselt_by_name_on_the_cpu_is_an_error_with_the_way_out(operand):
    layer = layer_of(operand, backend="cusparselt")
    with pytest.raises(EngineError, match=r"backend='cusparselt' needs a CUDA weight.*backend='auto'"):
        layer(torch.randn(4, 48, dtype=torch.bfloat16))
