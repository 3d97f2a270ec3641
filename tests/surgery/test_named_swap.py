"""torchao's call shapes: names to classes or configs, and back."""

import pytest
import torch
from torch import nn

from semisparse import (
    SemiSparseActivationLinear,
    SemiSparseLinear,
    SparseConfig,
    swap_linear_with_semi_sparse_linear,
    swap_semi_sparse_linear_with_linear,
)
from semisparse.errors import ConfigError, LayerRefusedError, NoLayerMatchedError
from tests.surgery.models import Network, Snapshot

FC1, FC2, PROJ = "blocks.0.mlp.fc1", "blocks.0.mlp.fc2", "blocks.1.attn.proj"


def test_each_name_gets_its_class_or_config_and_no_other_layer_changes() -> None:
    model = Network()
    settings = {FC1: SemiSparseLinear, FC2: SemiSparseActivationLinear, PROJ: SparseConfig(weight="row")}
    report = swap_linear_with_semi_sparse_linear(model, settings)
    assert set(report.swapped) == set(settings)
    assert type(model.get_submodule(FC1)) is SemiSparseLinear
    assert type(model.get_submodule(FC2)) is SemiSparseActivationLinear
    assert type(model.get_submodule(PROJ)) is SemiSparseLinear
    assert model.get_submodule(PROJ).sparse_config == SparseConfig(weight="row")
    assert model.get_submodule(FC1).sparse_config == SparseConfig()
    assert {row.reason for row in report if row.status == "skipped" and row.name != "head"} == {"not named"}
    assert "multiples of 4" in report.skipped["head"]
    swap_semi_sparse_linear_with_linear(model)
    assert not any(isinstance(module, SemiSparseLinear) for module in model.modules())


def test_the_old_examples_work_as_written() -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
    weight = model[0].weight
    swap_linear_with_semi_sparse_linear(model, {"0": SemiSparseLinear})
    assert model[0].weight is weight
    model(torch.randn(4, 16)).sum().backward()
    swap_semi_sparse_linear_with_linear(model)
    assert type(model[0]) is nn.Linear
    assert model[0].weight is weight
    layer = SemiSparseLinear.from_dense(nn.Linear(8, 8))
    assert type(SemiSparseLinear.to_dense(layer)) is nn.Linear


BAD_CALLS = {
    "nothing": (NoLayerMatchedError, "config is empty", {}),
    "unknown": (
        NoLayerMatchedError,
        r"config: 'blocks\.0\.mlp\.fc9'",
        {FC1: SemiSparseLinear, "blocks.0.mlp.fc9": SemiSparseLinear},
    ),
    "no_linear": (NoLayerMatchedError, "'norm' matches no nn.Linear", {"norm": SemiSparseLinear}),
    "shape": (
        LayerRefusedError,
        "config names 'head', which must stay dense.*out_features=10",
        {FC1: SemiSparseLinear, "head": SemiSparseLinear},
    ),
    "value": (ConfigError, rf"config\['{FC1}'\]='weight'", {FC1: "weight"}),
    "instance": (ConfigError, "must be SemiSparseLinear", {FC1: SemiSparseLinear(8, 8)}),
    "dense_class": (ConfigError, "must be SemiSparseLinear", {FC1: nn.Linear}),
    "list_of_names": (ConfigError, "must be a mapping from layer names", [FC1]),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_settings_raise_and_leave_the_model_as_it_was(case: str) -> None:
    error, message, settings = BAD_CALLS[case]
    model = Network()
    snapshot = Snapshot(model)
    with pytest.raises(error, match=message):
        swap_linear_with_semi_sparse_linear(model, settings)
    snapshot.assert_unchanged()


def test_a_layer_that_is_semi_sparse_already_is_refused() -> None:
    model = Network()
    swap_linear_with_semi_sparse_linear(model, {FC1: SemiSparseLinear})
    snapshot = Snapshot(model)
    with pytest.raises(LayerRefusedError, match="already semi-sparse: densify it first"):
        swap_linear_with_semi_sparse_linear(model, {FC2: SemiSparseLinear, FC1: SemiSparseLinear})
    snapshot.assert_unchanged()


def test_two_names_of_a_tied_layer_may_agree_but_not_differ() -> None:
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": shared, "b": shared})
    snapshot = Snapshot(model)
    with pytest.raises(ConfigError, match="'a' and 'b' are the same layer"):
        swap_linear_with_semi_sparse_linear(model, {"a": SemiSparseLinear, "b": SemiSparseActivationLinear})
    snapshot.assert_unchanged()
    report = swap_linear_with_semi_sparse_linear(model, {"b": SemiSparseLinear, "a": SemiSparseLinear})
    assert report.swapped == ("a",)


def test_a_tied_layer_that_one_of_its_homes_bypasses_is_refused_by_any_name() -> None:
    encoder = nn.TransformerEncoderLayer(8, 2, 16)
    model = nn.ModuleDict({"mine": encoder.linear1, "encoder": encoder, "other": nn.Linear(8, 8)})
    snapshot = Snapshot(model)
    with pytest.raises(LayerRefusedError, match=r"config names 'mine', which must stay dense.*TransformerEncoderLayer"):
        swap_linear_with_semi_sparse_linear(model, {"other": SemiSparseLinear, "mine": SemiSparseLinear})
    snapshot.assert_unchanged()
