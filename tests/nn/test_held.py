"""SemiSparseLinear with what a recipe holds on it, and with the greedy and soft masks."""

import copy
import pickle
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from semisparse import SemiSparseLinear, SparseConfig, ops
from semisparse.errors import ConfigError, TensorError
from semisparse.reference import linear, masks
from semisparse.testing import assert_bit_equal, small_integers
from tests.support import MaskArguments, Result, held_by, run_layer

K, N = 16, 12
CODES = ops.tile_codes(small_integers((N, K), seed=9), "transposable")
SETTINGS = {
    "greedy": MaskArguments("greedy"),
    "signed_greedy": MaskArguments("signed_greedy"),
    "soft": MaskArguments("soft", scale=torch.tensor(0.5)),
    "codes": MaskArguments("transposable", CODES),
}
EVERY_SETTING = pytest.mark.parametrize("setting", SETTINGS)
HOLDING = pytest.mark.parametrize("setting", ["soft", "codes"])


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def layer_of(setting: str, seed: int = 1) -> SemiSparseLinear:
    """Weights that are whole numbers, so that every product is exact."""
    layer = SemiSparseLinear(K, N, config=SparseConfig(weight=SETTINGS[setting].mask))
    with torch.no_grad():
        layer.weight.copy_(small_integers((N, K), seed=seed, limit=9))
        layer.bias.copy_(small_integers((N,), seed=2))
    layer.hold(**SETTINGS[setting].held)
    return layer


def pruned_by(layer: SemiSparseLinear) -> Tensor:
    """The weight as the layer must use it, by the reference."""
    weight, mask = layer.weight.detach(), layer.sparse_config.weight
    if mask == "soft":
        return linear.soft_threshold(weight, layer.held_scale)
    kept = masks.greedy(weight, signed=mask == "signed_greedy")
    return linear.prune(weight, kept if layer.held_codes is None else masks.from_codes(layer.held_codes))


def expect(layer: SemiSparseLinear, found: Result, x: Tensor, grad_output: Tensor) -> None:
    pruned = pruned_by(layer)
    assert_bit_equal(found.output + 0, linear.forward(x, pruned, layer.bias.detach()) + 0)
    assert_bit_equal(found.grad_input + 0, linear.grad_input(grad_output, pruned) + 0)
    assert_bit_equal(found.grad_weight + 0, linear.grad_weight(grad_output, x) + 0)
    assert_bit_equal(found.grad_bias + 0, linear.grad_bias(grad_output) + 0)


@EVERY_SETTING
def test_forward_and_gradients_are_those_of_the_pruned_weight(setting: str) -> None:
    layer = layer_of(setting)
    x, grad_output = small_integers((7, K), seed=3), small_integers((7, N), seed=4)
    expect(layer, run_layer(layer, x, grad_output), x, grad_output)
    with torch.no_grad():
        layer.weight.copy_(small_integers((N, K), seed=5, limit=9))
    expect(layer, run_layer(layer, x, grad_output), x, grad_output)


@EVERY_SETTING
def test_pruned_weight_is_what_the_forward_uses(setting: str) -> None:
    layer = layer_of(setting)
    pruned = layer.pruned_weight()
    assert not pruned.requires_grad
    assert_bit_equal(pruned, pruned_by(layer))
    for dtype in (torch.float64, torch.bfloat16):
        assert layer.to(dtype).pruned_weight().dtype == dtype


@EVERY_SETTING
def test_chosen_mask_follows_the_weight_whatever_is_held(setting: str) -> None:
    layer = layer_of(setting)
    for seed in range(3):
        with torch.no_grad():
            layer.weight.copy_(small_integers((N, K), seed=seed, limit=9))
        weight = layer.weight.detach()
        expected = {
            "greedy": masks.greedy,
            "signed_greedy": lambda matrix: masks.greedy(matrix, signed=True),
            "soft": masks.row,
            "codes": masks.transposable,
        }[setting](weight)
        assert torch.equal(layer.chosen_mask(), expected)
    if setting == "codes":
        assert not torch.equal(layer.chosen_mask(), masks.from_codes(layer.held_codes))


def test_the_soft_mask_needs_its_recipe() -> None:
    layer = SemiSparseLinear(K, N, config=SparseConfig(weight="soft"))
    for call in (lambda: layer(torch.ones(3, K)), layer.pruned_weight):
        with pytest.raises(ConfigError, match="start its recipe"):
            call()
    assert layer.chosen_mask().shape == (N, K)
    layer.sparse_enabled = False
    assert layer(torch.ones(3, K)).shape == (3, N)


@HOLDING
@pytest.mark.parametrize(
    "make_copy", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["deepcopy", "pickle"]
)
def test_a_copy_computes_the_same_with_a_held_tensor_of_its_own(setting: str, make_copy) -> None:
    layer, x = layer_of(setting), small_integers((7, K), seed=3)
    other = make_copy(layer)
    assert_bit_equal(other(x), layer(x))
    expected = layer(x)
    held_by(other).zero_()
    assert_bit_equal(layer(x), expected)
    assert not torch.equal(other(x), expected)


@HOLDING
def test_nothing_held_is_in_the_state_dict_or_follows_a_dtype(setting: str) -> None:
    layer = layer_of(setting)
    assert list(layer.state_dict()) == ["weight", "bias"]
    assert not list(layer.buffers())
    dtype = held_by(layer).dtype
    assert held_by(layer.half()).dtype == dtype
    assert layer(torch.ones(3, K).half()).dtype == torch.float16


@HOLDING
def test_going_dense_drops_what_was_held(setting: str) -> None:
    layer = layer_of(setting)
    SemiSparseLinear.to_dense(layer)
    assert type(layer) is nn.Linear
    assert set(vars(layer)) == set(vars(nn.Linear(K, N)))
    assert not SemiSparseLinear.from_dense(layer).holds


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # inside torch's own compiler
@EVERY_SETTING
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_without_graph_breaks(fresh_compiler: None, backend: str, setting: str) -> None:
    layer = layer_of(setting)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    x, grad_output = small_integers((7, K), seed=3), small_integers((7, N), seed=4)
    for seed in (1, 6):
        with torch.no_grad():
            layer.weight.copy_(small_integers((N, K), seed=seed, limit=9))
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        y = compiled(leaf)
        y.backward(grad_output)
        expect(layer, Result(y.detach(), leaf.grad, layer.weight.grad, layer.bias.grad), x, grad_output)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@HOLDING
def test_a_compiled_step_sees_what_was_refreshed_in_place_without_compiling_again(
    fresh_compiler: None, setting: str
) -> None:
    layer, x = layer_of(setting), small_integers((7, K), seed=3)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    outputs = []
    for seed in range(3):
        fresh = ops.tile_codes(small_integers((N, K), seed=seed), "transposable")
        held_by(layer).copy_(fresh if setting == "codes" else torch.tensor(seed + 1.0))
        outputs.append(compiled(x).detach())
        assert_bit_equal(outputs[-1] + 0, linear.forward(x, pruned_by(layer), layer.bias.detach()) + 0)
    assert counter.frame_count == 1
    assert not torch.equal(outputs[0], outputs[1])


@pytest.mark.parametrize("held", [{"scale": 2.0}, {"codes": [1, 2]}])
def test_what_is_held_must_be_a_tensor(held: dict) -> None:
    layer = layer_of("soft")
    before = held_by(layer)
    with pytest.raises(TensorError, match=f"{next(iter(held))}=.* is not a tensor"):
        layer.hold(**held)
    assert held_by(layer) is before
