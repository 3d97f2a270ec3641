"""share_outside_linear: what of a model lies in layers that sparsify cannot reach."""

import dataclasses

import pytest
import torch
from torch import nn

from semisparse import sparsify
from semisparse.errors import ConfigError
from semisparse.surgery.coverage import OutsideKind, share_outside_linear
from tests.surgery.models import Network


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.zeros(8, 64, 16))
        self.scale = nn.Parameter(torch.ones(1, 1, 64))


class Conv1D(nn.Module):
    """Named as the class of transformers is."""

    __module__ = "transformers.pytorch_utils"

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))


def test_a_model_of_linears_has_nothing_to_say_dense_or_semi_sparse() -> None:
    model = Network()
    dense = share_outside_linear(model)
    assert (dense.kinds, dense.share, dense.embeddings, str(dense)) == ((), 0, 0, "")
    norm = sum(p.numel() for p in model.norm.parameters())
    assert dense.total == sum(p.numel() for p in model.parameters()) == dense.linear + norm
    sparsify(model)
    assert share_outside_linear(model) == dense


def test_the_sentence_names_the_matrices_by_kind_largest_first() -> None:
    model = nn.ModuleList([Conv1D(64, 32), Conv1D(32, 64), Experts(), nn.Conv2d(3, 8, 4), nn.Linear(32, 32)])
    found = share_outside_linear(model)
    assert found.kinds == (
        OutsideKind("Parameter 'up' of Experts", 1, 8 * 64 * 16, (8, 64, 16), "3-D, as stacked experts are"),
        OutsideKind("Conv1D", 2, 2 * 32 * 64, None, "convert with semisparse.conv1d_to_linear"),
        OutsideKind("Conv2d", 1, 8 * 3 * 16, (8, 3, 4, 4)),
    )
    assert found.total == sum(p.numel() for p in model.parameters())
    assert found.share == (8 * 64 * 16 + 2 * 32 * 64 + 8 * 3 * 16) / found.total
    assert str(found) == (
        "91% of the parameters lie outside nn.Linear: 1 x Parameter 'up' of Experts (8 x 64 x 16; 3-D, as stacked "
        "experts are), 2 x Conv1D (convert with semisparse.conv1d_to_linear), 1 x Conv2d"
    )


def test_many_kinds_are_cut_short_and_equal_ones_grouped() -> None:
    model = nn.ModuleList([Experts(), Experts(), nn.Conv1d(4, 4, 4), nn.Conv2d(4, 4, 3), nn.Bilinear(4, 4, 4),
                           nn.ConvTranspose2d(2, 2, 2)])  # fmt: skip
    text = str(share_outside_linear(model))
    assert "2 x Parameter 'up' of Experts (8 x 64 x 16 each; 3-D" in text
    assert text.endswith(", 1 smaller kind")


def test_embeddings_and_vectors_are_not_named() -> None:
    model = nn.ModuleList([nn.Embedding(100, 8), nn.LayerNorm(8), nn.Linear(8, 8)])
    model.token = nn.Parameter(torch.zeros(1, 1, 8))
    found = share_outside_linear(model)
    assert (found.kinds, found.embeddings, str(found)) == ((), 800, "")
    model.append(nn.Conv2d(8, 8, 3))
    assert str(share_outside_linear(model)).endswith("1 x Conv2d; embeddings, not counted here: 54%")


@pytest.mark.parametrize("linear_first", [True, False])
def test_a_shared_parameter_counts_once_and_as_the_linears(linear_first: bool) -> None:
    head, embedding = nn.Linear(8, 100, bias=False), nn.Embedding(100, 8)
    head.weight = embedding.weight
    found = share_outside_linear(nn.ModuleList([head, embedding] if linear_first else [embedding, head]))
    assert (found.total, found.linear, found.embeddings) == (800, 800, 0)
    conv = nn.Conv2d(4, 4, 3)
    assert share_outside_linear(nn.ModuleList([conv, conv])).total == 4 * 4 * 9 + 4


def test_a_parametrised_layer_is_the_layer_that_it_was() -> None:
    linear = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
    found = share_outside_linear(nn.Sequential(linear))
    assert (found.kinds, found.linear) == ((), found.total)
    kinds = share_outside_linear(nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 4, 3))).kinds
    assert [kind.name for kind in kinds] == ["Conv2d"]


def test_small_shares_say_nothing() -> None:
    model = nn.ModuleList([nn.Linear(64, 64, bias=False), nn.Conv2d(2, 2, 7)])
    assert 0 < share_outside_linear(model).share < 0.05
    assert str(share_outside_linear(model)) == ""


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_models_on_meta_lazy_and_without_parameters() -> None:
    assert str(share_outside_linear(nn.Conv2d(8, 8, 3, device="meta"))).endswith("1 x Conv2d")
    assert share_outside_linear(nn.LazyConv2d(8, 3)).total == 0
    assert str(share_outside_linear(nn.ReLU())) == ""


def test_the_result_is_frozen_and_what_is_no_module_is_refused() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        share_outside_linear(nn.ReLU()).total = 1
    with pytest.raises(ConfigError, match="model is a list"):
        share_outside_linear([nn.Linear(4, 4)])
