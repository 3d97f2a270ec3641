"""densify: back to the dense class, with the master weight or the pruned one."""

import pytest
import torch
from torch import nn

from semisparse import SemiSparseActivationLinear, SemiSparseLinear, SparseConfig, densify, sparsify
from semisparse.errors import ConfigError, NoLayerMatchedError
from semisparse.testing import assert_bit_equal
from tests.support import brute_mask
from tests.surgery.models import LINEAR_NAMES, Network, Snapshot


def test_dense_gives_back_the_very_model_that_was_swapped() -> None:
    model = Network()
    snapshot = Snapshot(model)
    x = torch.randn(2, 4, 8)
    expected = model(x)
    sparsify(model)
    assert not torch.equal(model(x), expected)
    report = densify(model)
    snapshot.assert_unchanged()
    assert_bit_equal(model(x), expected)
    assert list(report.swapped) == LINEAR_NAMES
    assert {row.reason for row in report} == {"dense weight kept"}


@pytest.mark.parametrize("mask", ["transposable", "row"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_masked_computes_exactly_what_the_sparse_model_did(mask: str, dtype: torch.dtype) -> None:
    model = Network().to(dtype)
    sparsify(model, SparseConfig(weight=mask))
    weights = {name: model.get_submodule(name).weight for name in LINEAR_NAMES}
    x = torch.randn(2, 4, 8).to(dtype)
    expected = model(x)
    report = densify(model, weights="masked")
    assert_bit_equal(model(x), expected)
    assert {row.reason for row in report} == {"pruned weight written"}
    for name, weight in weights.items():
        assert type(model.get_submodule(name)) is nn.Linear
        assert model.get_submodule(name).weight is weight
        assert ((weight != 0).view(weight.shape[0], -1, 4).sum(-1) <= 2).all()


def test_masked_writes_the_transposable_mask() -> None:
    linear = nn.Linear(12, 16)
    expected = torch.where(brute_mask(linear.weight), linear.weight, 0)
    sparsify(linear)
    densify(linear, "masked")
    assert_bit_equal(linear.weight, expected)


def test_masked_leaves_the_weight_of_a_pruned_activation_and_says_so() -> None:
    model = Network()
    sparsify(model, SparseConfig(weight=None, activation="transposable"), select="fc1")
    before = model.blocks[0].mlp["fc1"].weight.detach().clone()
    report = densify(model, weights="masked")
    assert_bit_equal(model.blocks[0].mlp["fc1"].weight, before)
    assert all("dense weight kept" in row.reason and "activation" in row.reason for row in report)


def test_masked_can_be_trained_on_and_needs_no_gradient_to_be_written() -> None:
    model = Network()
    sparsify(model)
    densify(model, weights="masked")
    model(torch.randn(2, 4, 8)).sum().backward()
    assert all(parameter.is_leaf and parameter.grad is not None for parameter in model.parameters())


def test_tied_layers_are_turned_once_with_the_weight_pruned_once() -> None:
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": shared, "b": shared})
    expected = torch.where(brute_mask(shared.weight), shared.weight, 0)
    sparsify(model)
    assert densify(model, weights="masked").swapped == ("a",)
    assert type(shared) is nn.Linear
    assert_bit_equal(shared.weight, expected)


def test_both_kinds_in_one_model_and_a_dense_phase() -> None:
    model = Network()
    snapshot = Snapshot(model)
    sparsify(model, select="fc1")
    sparsify(model, SparseConfig(weight=None, activation="transposable"), select="fc2")
    model.blocks[0].mlp["fc1"].sparse_enabled = False
    assert {type(m) for m in model.modules()} >= {SemiSparseLinear, SemiSparseActivationLinear}
    densify(model)
    snapshot.assert_unchanged()


def test_a_model_without_semi_sparse_layers_is_refused_also_the_second_time() -> None:
    model = Network()
    with pytest.raises(NoLayerMatchedError, match="model=Network has no semi-sparse layer"):
        densify(model)
    sparsify(model)
    densify(model)
    with pytest.raises(NoLayerMatchedError):
        densify(model)


@pytest.mark.parametrize("weights", ["pruned", "", None, True])
def test_an_unknown_kind_of_weights_is_refused_and_changes_nothing(weights: object) -> None:
    model = Network()
    sparsify(model)
    snapshot = Snapshot(model)
    with pytest.raises(ConfigError, match=rf"weights={weights!r} is not one of 'dense', 'masked'"):
        densify(model, weights)
    snapshot.assert_unchanged()


@pytest.mark.parametrize("model", [None, [nn.Linear(4, 4)], nn.Linear])
def test_what_is_no_module_is_refused(model: object) -> None:
    with pytest.raises(ConfigError, match="model is a"):
        densify(model)
