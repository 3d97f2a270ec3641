"""What conv1d_to_linear and linear_to_conv1d refuse: with the reason, and nothing is changed."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from semisparse.errors import ConfigError, LayerRefusedError, NoLayerMatchedError
from semisparse.surgery.conv1d import conv1d_to_linear, linear_to_conv1d
from tests.surgery.conv1d_models import Block, Conv1D, OwnConv1D
from tests.surgery.models import Snapshot


class Masked(torch.Tensor):
    """A tensor subclass."""


class Adapter(nn.Module):
    """As peft's LoRA around a Conv1D."""

    def __init__(self) -> None:
        super().__init__()
        self.fan_in_fan_out, self.base_layer = True, Conv1D(8, 8)


def with_weight(make: Callable[[Tensor], object]) -> nn.Module:
    layer = Conv1D(8, 12)
    layer._parameters["weight"] = make(layer.weight.detach())
    return layer


def with_attribute(name: str, value: object) -> nn.Module:
    layer = Conv1D(8, 12)
    setattr(layer, name, value)
    return layer


def sharing(other: Callable[[nn.Module], nn.Module]) -> nn.Module:
    layer = Conv1D(8, 8)
    return nn.ModuleList([layer, other(layer)])


def tied_linear(layer: nn.Module) -> nn.Module:
    linear = nn.Linear(8, 8)
    linear.weight = layer.weight
    return linear


def hooked(method: str) -> nn.Module:
    layer = Conv1D(8, 12)
    getattr(layer.weight, method)(lambda *_: None)
    return layer


def in_inference_mode() -> nn.Module:
    with torch.inference_mode():
        return Conv1D(8, 12)


class Identity(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


REFUSED = {
    "subclass": (lambda: type("FSDPConv1D", (Conv1D,), {})(8, 12), "subclass of Conv1D: pass its own class"),
    "pruned": (lambda: prune.identity(Conv1D(8, 12), "weight"), "not a Parameter, but computed by a hook"),
    "subclass_of_tensor": (lambda: with_weight(lambda w: w.as_subclass(Masked)), "its weight is a Masked"),
    "sharded": (lambda: with_weight(lambda w: nn.Parameter(w[:6])), r"shape \(6, 8\), not \(nx, nf\)=\(12, 8\)"),
    "inference": (in_inference_mode, "an inference tensor"),
    "forward": (lambda: with_attribute("forward", len), "forward was replaced on the instance"),
    "bias": (lambda: with_attribute("bias", nn.Parameter(torch.zeros(12))), "the bias that fits it"),
    "in_features": (lambda: with_attribute("in_features", 12), "in_features or out_features of its own"),
    "adapter": (Adapter, "the adapter Adapter around it"),
    "hook": (lambda: hooked("register_hook"), "gradient hooks"),
    "post_hook": (lambda: hooked("register_post_accumulate_grad_hook"), "gradient hooks"),
    "tied": (lambda: sharing(tied_linear), r"bad\.0\.weight and bad\.1\.weight share"),
    "view": (lambda: sharing(lambda layer: nn.ParameterList([layer.weight.detach().view(64)])), r"bad\.1\.0 must keep"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_converted_is_refused_with_the_reason_and_nothing_changes(case: str) -> None:
    make, message = REFUSED[case]
    model = nn.ModuleDict({"first": Conv1D(8, 12), "bad": make()})
    snapshot = Snapshot(model)
    with pytest.raises(LayerRefusedError, match=message):
        conv1d_to_linear(model)
    snapshot.assert_unchanged()
    conv1d_to_linear(model["first"])
    conv1d_to_linear(converted := Conv1D(8, 12))
    assert linear_to_conv1d(nn.ModuleList([model["first"], converted])) == ("0", "1")


def test_parametrised_layers_are_refused_both_ways() -> None:
    for ready in (False, True):
        layer = Conv1D(8, 12)
        if ready:
            conv1d_to_linear(layer)
        parametrize.register_parametrization(layer, "weight", Identity())
        with pytest.raises(LayerRefusedError, match="remove_parametrizations"):
            (linear_to_conv1d if ready else conv1d_to_linear)(layer)


def test_what_happened_to_a_converted_layer_can_forbid_the_way_back() -> None:
    wrapped, resized, tied, adapter = Conv1D(8, 12), Conv1D(8, 12), Conv1D(8, 8), Adapter()
    adapter.fan_in_fan_out = False
    conv1d_to_linear(adapter.base_layer)
    for layer in (wrapped, resized, tied):
        conv1d_to_linear(layer)
    wrapped.__class__ = type("FSDPLinear", (nn.Linear,), {})
    resized.weight = nn.Parameter(torch.zeros(4, 12))
    for model, message in (
        (wrapped, "its class was changed since"),
        (resized, r"shape \(4, 12\), not \(8, 12\)"),
        (nn.ModuleList([tied_linear(tied), tied]), "share their values"),
        (adapter, "the adapter Adapter around it"),
    ):
        snapshot = Snapshot(model)
        with pytest.raises(LayerRefusedError, match=message):
            linear_to_conv1d(model)
        snapshot.assert_unchanged()


def test_a_live_graph_is_noticed_and_a_dead_one_is_none() -> None:
    model = Conv1D(8, 12)
    loss = model(torch.randn(4, 12)).sum()
    for _ in range(2):  # asking leaves no trace
        with pytest.raises(LayerRefusedError, match=r"\(root\).*a graph still holds its weight.*del loss"):
            conv1d_to_linear(model)
    del loss
    conv1d_to_linear(model)
    loss = model(torch.randn(4, 12)).sum()
    with pytest.raises(LayerRefusedError, match="DistributedDataParallel"):
        linear_to_conv1d(model)
    loss.backward()
    assert model.weight.grad.shape == (8, 12)


def test_a_backward_that_saved_a_frozen_weight_raises_rather_than_using_the_transpose() -> None:
    model = Conv1D(8, 8)
    model.weight.requires_grad_(False)
    y = model(torch.randn(4, 8, requires_grad=True))
    conv1d_to_linear(model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_nothing_to_convert_is_an_error() -> None:
    model = nn.Sequential(nn.Linear(8, 8), OwnConv1D(8, 8), nn.Conv1d(8, 8, 1))
    snapshot = Snapshot(model)
    with pytest.raises(NoLayerMatchedError, match=r"model=Sequential has no Conv1D of transformers, so.*classes="):
        conv1d_to_linear(model)
    with pytest.raises(NoLayerMatchedError, match="and none of classes"):
        conv1d_to_linear(model, nn.Bilinear)
    with pytest.raises(NoLayerMatchedError, match="no layer that conv1d_to_linear converted"):
        linear_to_conv1d(model)
    snapshot.assert_unchanged()


@pytest.mark.parametrize("classes", [None, nn.Linear, "Conv1D", int, [Conv1D(4, 4)]], ids=str)
def test_what_is_no_class_of_layers_is_refused(classes: object) -> None:
    with pytest.raises(ConfigError, match="classes="):
        conv1d_to_linear(Block(), classes)


@pytest.mark.parametrize("function", [conv1d_to_linear, linear_to_conv1d])
def test_what_is_no_module_is_refused(function: Callable[[object], object]) -> None:
    with pytest.raises(ConfigError, match="model is a list"):
        function([Conv1D(4, 4)])
