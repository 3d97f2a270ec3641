"""conv1d_to_linear and linear_to_conv1d: the same layer with its weight transposed, there and back bit for bit."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semisparse import SparseConfig, densify, sparsify
from semisparse.errors import LayerRefusedError, NoLayerMatchedError
from semisparse.surgery.conv1d import conv1d_to_linear, linear_to_conv1d
from semisparse.testing import assert_as_good_as_torch, assert_bit_equal, small_integers
from tests.surgery.conv1d_models import Block, Conv1D, OwnConv1D
from tests.surgery.models import Snapshot

NAMES = ("c_attn", "c_proj", "mlp.c_fc", "mlp.c_proj")


def test_weights_are_transposed_bit_for_bit_and_only_those() -> None:
    model = Block()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert conv1d_to_linear(model) == NAMES
    for name, value in model.state_dict().items():
        turned = name.removesuffix(".weight") in NAMES
        assert_bit_equal(value, before[name].t() if turned else before[name])
        assert value.is_contiguous()
    for name in NAMES:
        layer = model.get_submodule(name)
        assert type(layer) is nn.Linear
        assert layer.weight.shape == (layer.out_features, layer.in_features) == (layer.nf, layer.nx)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_function_and_its_gradients_are_the_same(dtype: torch.dtype) -> None:
    def run(layer: nn.Module, x: Tensor, grad: Tensor) -> list[Tensor]:
        layer.zero_grad()
        x = x.clone().requires_grad_()
        y = layer(x)
        y.backward(grad)
        weight = layer.weight.grad.t() if isinstance(layer, nn.Linear) else layer.weight.grad
        return [y.detach(), x.grad, weight.clone(), layer.bias.grad.clone()]

    layer = Conv1D(24, 40).to(dtype)
    with torch.no_grad():
        layer.weight.copy_(small_integers((40, 24), seed=1))
        layer.bias.copy_(small_integers((24,), seed=2))
    x, grad = small_integers((3, 7, 40), seed=3, dtype=dtype), small_integers((3, 7, 24), seed=4, dtype=dtype)
    expected = run(layer, x, grad)
    conv1d_to_linear(layer)
    for ours, theirs in zip(run(layer, x, grad), expected, strict=True):
        assert_bit_equal(ours + 0.0, theirs + 0.0)  # the sign of a zero depends on the order of summation

    linear_to_conv1d(layer)
    with torch.no_grad():
        layer.weight.normal_()
    x, grad = torch.randn(64, 40).to(dtype), torch.randn(64, 24).to(dtype)
    expected, exact = run(layer, x, grad), run(copy.deepcopy(layer).double(), x.double(), grad.double())
    conv1d_to_linear(layer)
    for ours, theirs, best in zip(run(layer, x, grad), expected, exact, strict=True):
        assert_as_good_as_torch(ours, theirs, best)


def test_there_and_back_leaves_the_very_model_and_everything_around_it() -> None:
    model = Block().eval()
    model.c_proj.train()
    model.c_attn.weight.requires_grad_(False)
    model.c_attn.weight.mark = "kept"
    seen: list[str] = []
    model.c_attn.register_forward_hook(lambda *_: seen.append("forward"))
    layer, weight = model.c_attn, model.c_attn.weight
    snapshot, x = Snapshot(model), torch.randn(2, 5, 16)
    expected = model(x).detach()
    conv1d_to_linear(model)
    assert model.c_attn is layer and layer.weight is weight
    assert not weight.requires_grad and weight.mark == "kept" and not layer.training and model.c_proj.training
    model(x)
    assert seen == ["forward"] * 2
    assert linear_to_conv1d(model) == NAMES
    snapshot.assert_unchanged()
    assert_bit_equal(model(x).detach(), expected)


@pytest.mark.filterwarnings("ignore:a layer with a pruned activation")
@pytest.mark.parametrize(
    "config", [SparseConfig(), SparseConfig(weight=None, activation="transposable")], ids=["weight", "activation"]
)
def test_sparsify_and_densify_in_between(config: SparseConfig) -> None:
    model = Block()
    snapshot = Snapshot(model)
    conv1d_to_linear(model)
    assert sparsify(model, config).swapped == NAMES
    sparse = Snapshot(model)
    with pytest.raises(
        LayerRefusedError, match=r"c_attn \(SemiSparse\w*Linear\).*semi-sparse: call semisparse.densify"
    ):
        linear_to_conv1d(model)
    sparse.assert_unchanged()
    with pytest.raises(NoLayerMatchedError):
        conv1d_to_linear(model)
    densify(model)
    linear_to_conv1d(model)
    snapshot.assert_unchanged()


def test_pruned_weights_come_back_as_a_conv1d() -> None:
    layer = OwnConv1D(16, 32)
    conv1d_to_linear(layer, OwnConv1D)
    sparsify(layer)
    pruned = layer.pruned_weight()
    densify(layer, "masked")
    assert linear_to_conv1d(layer) == ("",)
    assert_bit_equal(layer.weight.detach(), pruned.t())


def test_an_optimizer_and_gradients_from_before_stay_valid() -> None:
    model, reference = Block(), Block()
    reference.load_state_dict(model.state_dict())
    x = torch.randn(2, 5, 16)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.1) for m in (model, reference)]
    for m in (model, reference):
        m(x).square().mean().backward()
    conv1d_to_linear(model)
    for name in NAMES:
        assert_bit_equal(model.get_submodule(name).weight.grad, reference.get_submodule(name).weight.grad.t())
    for optimizer in optimizers:
        optimizer.step()
    linear_to_conv1d(model)
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        assert_bit_equal(ours, theirs)


def test_a_state_of_an_earlier_step_has_the_old_shape_and_the_optimizer_says_so() -> None:
    model = Conv1D(48, 16)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 16)).sum().backward()
    optimizer.step()
    conv1d_to_linear(model)
    with pytest.raises(RuntimeError, match="size of tensor"):
        optimizer.step()


def test_a_layer_and_a_weight_under_two_names_are_turned_once() -> None:
    shared, first, second = Conv1D(8, 16), Conv1D(8, 12), Conv1D(8, 12)
    second.weight = first.weight
    model = nn.ModuleDict({"a": shared, "b": shared, "c": first, "d": second})
    snapshot = Snapshot(model)
    assert conv1d_to_linear(model) == ("a", "c", "d")
    assert second.weight is first.weight and first.weight.shape == (8, 12) and shared.weight.shape == (8, 16)
    assert linear_to_conv1d(model) == ("a", "c", "d")
    snapshot.assert_unchanged()


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_copies_of_converted_models_work_and_go_back(copied: Callable[[nn.Module], nn.Module]) -> None:
    model, x = Block(OwnConv1D), torch.randn(2, 5, 16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    conv1d_to_linear(model, [OwnConv1D])
    other = copied(model)
    assert_bit_equal(other(x).detach(), model(x).detach())
    assert linear_to_conv1d(other) == NAMES
    assert type(other.c_attn) is OwnConv1D and type(model.c_attn) is nn.Linear
    for name, value in other.state_dict().items():
        assert_bit_equal(value, before[name])


def test_meta_models_and_strided_weights_convert() -> None:
    with torch.device("meta"):
        model = Block()
    conv1d_to_linear(model)
    assert model.c_attn.weight.is_meta and model.c_attn.weight.shape == (48, 16)
    linear_to_conv1d(model)
    assert model.c_attn.weight.shape == (16, 48)
    layer = Conv1D(8, 12)
    layer.weight = nn.Parameter(torch.randn(8, 12).t())
    snapshot = Snapshot(layer)
    conv1d_to_linear(layer)
    assert layer.weight.is_contiguous()
    linear_to_conv1d(layer)
    snapshot.assert_unchanged()


def test_a_layer_without_bias_and_conversion_inside_inference_mode() -> None:
    layer = OwnConv1D(8, 12)
    layer.bias = None
    with torch.inference_mode():
        conv1d_to_linear(layer, OwnConv1D)
    x = torch.randn(4, 12)
    assert_bit_equal(layer(x).detach(), F.linear(x, layer.weight).detach())
    layer(x).sum().backward()
    linear_to_conv1d(layer)
    assert layer.weight.grad.shape == (12, 8)


def test_running_out_of_memory_half_way_turns_the_first_ones_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Block()
    snapshot, real, calls = Snapshot(model), Tensor.contiguous, []

    def contiguous(tensor: Tensor) -> Tensor:
        calls.append(tensor)
        if len(calls) == 3:
            raise MemoryError
        return real(tensor)

    monkeypatch.setattr(Tensor, "contiguous", contiguous)
    with pytest.raises(MemoryError):
        conv1d_to_linear(model)
    monkeypatch.undo()
    assert len(calls) == 5
    snapshot.assert_unchanged()


def test_an_old_state_dict_does_not_load_into_a_converted_model_but_does_after_going_back() -> None:
    model = Block()
    old = {name: value.clone() for name, value in model.state_dict().items()}
    conv1d_to_linear(model)
    assert list(model.state_dict()) == list(old)
    with pytest.raises(RuntimeError, match=r"size mismatch for c_attn\.weight"):
        model.load_state_dict(old)
    linear_to_conv1d(model)
    model.load_state_dict(old)
