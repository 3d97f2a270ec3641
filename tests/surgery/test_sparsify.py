"""sparsify: what it changes, what it must leave alone, and its report."""

import copy

import pytest
import torch
from torch import nn

from semisparse import (
    SemiSparseActivationLinear,
    SemiSparseLinear,
    SparseConfig,
    densify,
    register_linear,
    sparsify,
    swap_linear_with_semi_sparse_linear,
)
from semisparse.errors import ConfigError, NoLayerMatchedError
from semisparse.nn import registry
from semisparse.testing import assert_bit_equal
from tests.support import config_of
from tests.surgery.models import LINEAR_NAMES, Network, Snapshot


def test_every_linear_that_can_be_swapped_is() -> None:
    model = Network()
    report = sparsify(model)
    assert list(report.swapped) == LINEAR_NAMES
    assert all(type(model.get_submodule(name)) is SemiSparseLinear for name in LINEAR_NAMES)
    assert type(model.head) is nn.Linear
    assert type(model.norm) is nn.LayerNorm


@pytest.mark.parametrize("operand", ["weight", "activation"])
def test_the_config_decides_the_class_and_arrives_in_the_layer(operand: str) -> None:
    config = config_of(operand)
    model = Network()
    sparsify(model, config)
    layer = model.blocks[0].mlp["fc1"]
    assert type(layer) is {"weight": SemiSparseLinear, "activation": SemiSparseActivationLinear}[operand]
    assert layer.sparse_config is config


def test_parameters_hooks_training_flag_and_references_stay() -> None:
    model = Network().eval()
    layer = model.blocks[1].mlp["fc2"]
    hook = layer.register_forward_hook(lambda *_: None)
    parameters = {name: (id(value), value.detach().clone()) for name, value in model.named_parameters()}
    sparsify(model)
    assert model.blocks[1].mlp["fc2"] is layer
    assert not layer.training
    assert hook.id in layer._forward_hooks
    assert {name: id(value) for name, value in model.named_parameters()} == {n: i for n, (i, _) in parameters.items()}
    for name, value in model.named_parameters():
        assert_bit_equal(value, parameters[name][1])
    assert list(model.state_dict()) == list(Network().state_dict())


@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.AdamW])
def test_an_optimizer_built_before_moves_the_swapped_weights(cls: type[torch.optim.Optimizer]) -> None:
    model = Network()
    optimizer = cls(model.parameters(), lr=0.1)
    x = torch.randn(2, 4, 8)
    for swap in (lambda: None, lambda: sparsify(model), lambda: densify(model)):
        swap()
        before = model.blocks[0].mlp["fc1"].weight.detach().clone()
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
        assert not torch.equal(model.blocks[0].mlp["fc1"].weight, before)
    assert len(optimizer.state) == (0 if cls is torch.optim.SGD else len(list(model.parameters())))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_dtype_and_device_stay(dtype: torch.dtype, device: str) -> None:
    model = Network().to(device=device, dtype=dtype)
    sparsify(model)
    assert {(p.dtype, p.device.type) for p in model.parameters()} == {(dtype, device)}


def test_a_root_linear_has_no_name_and_is_swapped_in_place() -> None:
    for swap in (sparsify, lambda model: swap_linear_with_semi_sparse_linear(model, {"": SemiSparseLinear})):
        linear = nn.Linear(8, 4)
        report = swap(linear)
        assert type(linear) is SemiSparseLinear
        assert report.swapped == ("",)
        assert "(root)" in str(report)


def test_tied_layers_are_swapped_once_and_reported_under_both_names() -> None:
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"encoder": shared, "decoder": shared, "other": nn.Linear(8, 8)})
    report = sparsify(model)
    assert report.swapped == ("encoder", "other")
    assert report.skipped == {"decoder": "the same layer as encoder, swapped there"}
    assert model["encoder"] is model["decoder"] is shared
    densify(model)
    assert type(shared) is nn.Linear


def test_a_tied_layer_that_one_name_excludes_stays_dense() -> None:
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"encoder": shared, "decoder": shared, "other": nn.Linear(8, 8)})
    report = sparsify(model, exclude="decoder")
    assert type(shared) is nn.Linear
    assert report.swapped == ("other",)
    assert report.skipped.keys() == {"encoder", "decoder"}


def test_tied_parameters_of_two_layers_stay_tied() -> None:
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8), "embedding": nn.Embedding(8, 8)})
    model["b"].weight = model["a"].weight
    model["embedding"].weight = model["a"].weight
    assert sparsify(model, select=["a", "b"]).swapped == ("a", "b")
    assert model["a"].weight is model["b"].weight is model["embedding"].weight


def test_the_report_has_a_row_for_every_linear_with_the_reason() -> None:
    model = Network()
    report = sparsify(model, select="blocks", exclude=["blocks.0.attn", "*.proj"])
    assert [row.name for row in report] == [*LINEAR_NAMES, "head"]
    assert len(report) == 9
    reasons = report.skipped
    assert reasons["blocks.0.attn.qkv"] == "excluded"
    assert reasons["blocks.1.attn.proj"] == "excluded"
    assert reasons["blocks.0.attn.proj"] == "excluded"
    assert "multiples of 4" in reasons["head"]  # a layer that could never be swapped says so, selected or not
    lines = str(report).splitlines()
    assert len(lines) == 11
    assert lines[0].split()[0] == "layer"
    assert any(line.split()[:5] == ["blocks.1.mlp.fc1", "16", "x", "8", "swapped"] for line in lines)
    assert any(line.startswith("head") and line.endswith("multiples of 4") and "10 x 8" in line for line in lines)
    assert sparsify(Network(), select="fc1").skipped["blocks.0.mlp.fc2"] == "not selected"
    assert "5 of 9 linear layers swapped" in lines[-1]


def test_a_layer_whose_shape_does_not_fit_is_reported_with_its_sizes() -> None:
    reasons = sparsify(Network()).skipped
    assert list(reasons) == ["head"]
    assert "in_features=8 and out_features=10 must both be multiples of 4" in reasons["head"]


@pytest.mark.parametrize(("n", "k", "noted"), [(32, 48, False), (32, 20, True), (20, 32, True), (8, 4, True)])
@pytest.mark.parametrize("operand", ["weight", "activation"])
def test_a_swapped_layer_that_no_sparse_product_fits_says_so(n: int, k: int, noted: bool, operand: str) -> None:
    report = sparsify(nn.Sequential(nn.Linear(k, n)), config_of(operand))
    assert report.swapped == ("0",)
    note = "always masked dense: sparse products need N and K in multiples of 16"
    assert [row.reason for row in report] == [note if noted else ""]
    assert (note in str(report)) == noted


def test_an_exclude_that_matches_nothing_is_remarked() -> None:
    report = sparsify(Network(), exclude=["heads", "norm"])
    assert [remark.count("matched no linear layer") for remark in report.remarks] == [1, 1]
    assert str(report).splitlines()[-2:] == list(report.remarks)
    assert not sparsify(Network(), exclude="head").remarks


def test_a_second_swap_reports_the_first_and_changes_nothing() -> None:
    model = Network()
    sparsify(model, select="fc1")
    report = sparsify(model, SparseConfig(weight=None, activation="transposable"))
    assert "already semi-sparse" in report.skipped["blocks.0.mlp.fc1"]
    assert type(model.blocks[0].mlp["fc1"]) is SemiSparseLinear
    assert type(model.blocks[0].mlp["fc2"]) is SemiSparseActivationLinear
    snapshot = Snapshot(model)
    with pytest.raises(NoLayerMatchedError, match="already semi-sparse: densify it first"):
        sparsify(model)
    snapshot.assert_unchanged()


def test_a_copy_of_a_swapped_model_is_independent() -> None:
    model = Network()
    sparsify(model)
    other = copy.deepcopy(model)
    densify(other)
    assert type(model.blocks[0].mlp["fc1"]) is SemiSparseLinear
    assert type(other.blocks[0].mlp["fc1"]) is nn.Linear


class PlainLinear(nn.Linear):
    """Computes F.linear, as a subclass from a model library might."""


def test_a_subclass_is_refused_until_registered_and_restored_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_PLAIN_LINEARS", {nn.Linear})
    model = nn.Sequential(PlainLinear(8, 8))
    snapshot = Snapshot(model)
    with pytest.raises(NoLayerMatchedError, match=r"PlainLinear is a subclass.*call semisparse\.register_linear"):
        sparsify(model)
    snapshot.assert_unchanged()
    assert register_linear(PlainLinear) is PlainLinear
    sparsify(model)
    assert isinstance(model[0], SemiSparseLinear)
    assert isinstance(model[0], PlainLinear)
    again = copy.deepcopy(model)
    for swapped in (model, again):
        densify(swapped)
        assert type(swapped[0]) is PlainLinear
        assert "_dense_class" not in vars(swapped[0])
    snapshot.assert_unchanged()


@pytest.mark.parametrize("cls", [nn.Conv1d, SemiSparseLinear, nn.Linear(4, 4), "Linear"], ids=str)
def test_only_dense_linear_classes_can_be_registered(cls: object) -> None:
    with pytest.raises(ConfigError, match=r"must be a dense subclass of torch\.nn\.Linear"):
        register_linear(cls)


BAD_CALLS = {
    "model": (ConfigError, "model is a list", lambda model: sparsify([model])),
    "model_class": (ConfigError, "model is a type", lambda model: sparsify(Network)),
    "config": (ConfigError, "config='weight' must be a SparseConfig", lambda model: sparsify(model, "weight")),
    "config_class": (ConfigError, "must be a SparseConfig", lambda model: sparsify(model, SemiSparseLinear)),
    "select": (ConfigError, "select=3", lambda model: sparsify(model, select=3)),
    "select_list": (ConfigError, "select=None", lambda model: sparsify(model, select=["mlp", None])),
    "select_class": (ConfigError, "select=<class", lambda model: sparsify(model, select=nn.Linear)),
    "exclude": (ConfigError, "exclude=1.5", lambda model: sparsify(model, exclude=[1.5])),
    "select_nothing": (NoLayerMatchedError, "select is empty", lambda model: sparsify(model, select=[])),
    "unknown": (NoLayerMatchedError, "'mlq'", lambda model: sparsify(model, select="mlq")),
    "one_of_two": (NoLayerMatchedError, "'mlq'", lambda model: sparsify(model, select=["mlp", "mlq"])),
    "all_excluded": (NoLayerMatchedError, "excluded", lambda model: sparsify(model, exclude="*")),
    "unfit": (NoLayerMatchedError, "out_features=10", lambda model: sparsify(model, select="head")),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls_raise_a_typed_error_and_leave_the_model_as_it_was(case: str) -> None:
    error, message, call = BAD_CALLS[case]
    model = Network()
    snapshot = Snapshot(model)
    with pytest.raises(error, match=message):
        call(model)
    snapshot.assert_unchanged()


def test_a_model_without_linears_says_so() -> None:
    with pytest.raises(NoLayerMatchedError, match=r"model=Conv1d contains no nn\.Linear"):
        sparsify(nn.Conv1d(4, 4, 1))
