"""SemiSparseLinear with what a recipe freezes on it, and with the greedy and soft masks."""

import copy
import pickle
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from semisparse import SemiSparseLinear, SparseConfig, ops
from semisparse.errors import ConfigError
from semisparse.reference import linear, masks
from semisparse.testing import assert_bit_equal, small_integers
from tests.support import Result, run_layer

K, N = 16, 12
CODES = ops.tile_codes(small_integers((N, K), seed=9), "transposable")
SETTINGS = {  # mask of the config, and what is frozen
    "greedy": ("greedy", None),
    "signed_greedy": ("signed_greedy", None),
    "soft": ("soft", torch.tensor(0.5)),
    "codes": ("transposable", CODES),
}
EVERY_SETTING = pytest.mark.parametrize("setting", SETTINGS)
WITH_FROZEN = pytest.mark.parametrize("setting", ["soft", "codes"])


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def layer_of(setting: str, seed: int = 1) -> SemiSparseLinear:
    """Weights that are whole numbers, so that every product is exact."""
    mask, frozen = SETTINGS[setting]
    layer = SemiSparseLinear(K, N, config=SparseConfig(mask=mask))
    with torch.no_grad():
        layer.weight.copy_(small_integers((N, K), seed=seed, limit=9))
        layer.bias.copy_(small_integers((N,), seed=2))
    if frozen is not None:
        layer._frozen = frozen.clone()
    return layer


def pruned_by(layer: SemiSparseLinear) -> Tensor:
    """The weight as the layer must use it, by the reference."""
    weight, mask = layer.weight.detach(), layer.sparse_config.mask
    if mask == "soft":
        return linear.soft_threshold(weight, layer._frozen)
    kept = masks.greedy(weight, signed=mask == "signed_greedy")
    return linear.prune(weight, kept if layer._frozen is None else masks.from_codes(layer._frozen))


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
def test_chosen_mask_follows_the_weight_whatever_is_frozen(setting: str) -> None:
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
        assert not torch.equal(layer.chosen_mask(), masks.from_codes(layer._frozen))


def test_the_soft_mask_needs_its_recipe() -> None:
    layer = SemiSparseLinear(K, N, config=SparseConfig(mask="soft"))
    for call in (lambda: layer(torch.ones(3, K)), layer.pruned_weight):
        with pytest.raises(ConfigError, match="start one"):
            call()
    assert layer.chosen_mask().shape == (N, K)
    layer.sparse_enabled = False
    assert layer(torch.ones(3, K)).shape == (3, N)


@WITH_FROZEN
@pytest.mark.parametrize(
    "make_copy", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["deepcopy", "pickle"]
)
def test_a_copy_computes_the_same_with_a_frozen_tensor_of_its_own(setting: str, make_copy) -> None:
    layer, x = layer_of(setting), small_integers((7, K), seed=3)
    other = make_copy(layer)
    assert_bit_equal(other(x), layer(x))
    expected = layer(x)
    other._frozen.zero_()
    assert_bit_equal(layer(x), expected)
    assert not torch.equal(other(x), expected)


@WITH_FROZEN
def test_nothing_frozen_is_in_the_state_dict_or_follows_a_dtype(setting: str) -> None:
    layer = layer_of(setting)
    assert list(layer.state_dict()) == ["weight", "bias"]
    assert not list(layer.buffers())
    dtype = layer._frozen.dtype
    assert layer.half()._frozen.dtype == dtype
    assert layer(torch.ones(3, K).half()).dtype == torch.float16


@WITH_FROZEN
def test_going_dense_drops_what_was_frozen(setting: str) -> None:
    layer = layer_of(setting)
    SemiSparseLinear.to_dense(layer)
    assert type(layer) is nn.Linear
    assert set(vars(layer)) == set(vars(nn.Linear(K, N)))
    assert SemiSparseLinear.from_dense(layer)._frozen is None


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
@WITH_FROZEN
def test_a_compiled_step_sees_what_was_refreshed_in_place_without_compiling_again(
    fresh_compiler: None, setting: str
) -> None:
    layer, x = layer_of(setting), small_integers((7, K), seed=3)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    outputs = []
    for seed in range(3):
        fresh = ops.tile_codes(small_integers((N, K), seed=seed), "transposable")
        layer._frozen.copy_(fresh if setting == "codes" else torch.tensor(seed + 1.0))
        outputs.append(compiled(x).detach())
        assert_bit_equal(outputs[-1] + 0, linear.forward(x, pruned_by(layer), layer.bias.detach()) + 0)
    assert counter.frame_count == 1
    assert not torch.equal(outputs[0], outputs[1])
