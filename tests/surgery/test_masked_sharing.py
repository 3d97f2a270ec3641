"""densify(weights="masked") never writes into memory that is used elsewhere."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from semisparse import SparseConfig, densify, recipes, sparsify
from semisparse.errors import LayerRefusedError
from semisparse.recipes import RecipeSchedule
from semisparse.testing import assert_bit_equal
from tests.surgery.models import Snapshot

X = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))


def pair() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False))


def tied_embedding() -> nn.ModuleDict:
    model = nn.ModuleDict({"table": nn.Embedding(32, 16), "head": nn.Linear(16, 32, bias=False)})
    model["head"].weight = model["table"].weight
    sparsify(model, select="head")
    return model


def excluded_twin() -> nn.Sequential:
    model = pair()
    model[1].weight = model[0].weight
    sparsify(nn.ModuleList([model[0]]))
    return model


def view_of_the_same_memory() -> nn.Sequential:
    model = pair()
    model[1].weight = nn.Parameter(model[0].weight.data)
    sparsify(nn.ModuleList([model[0]]))
    return model


def overlapping_buffer() -> nn.Sequential:
    model = pair()
    flat = torch.randn(400)
    model[0].weight = nn.Parameter(flat[:256].view(16, 16))
    model.register_buffer("tail", flat[255:])
    sparsify(model)
    return model


def two_masks() -> nn.Sequential:
    model = pair()
    model[1].weight = model[0].weight
    sparsify(nn.ModuleList([model[0]]))
    sparsify(nn.ModuleList([model[1]]), SparseConfig(weight="row"))
    return model


def two_views_both_sparse() -> nn.Sequential:
    model = pair()
    model[1].weight = nn.Parameter(model[0].weight.data)
    sparsify(model)
    return model


SHARED = [tied_embedding, excluded_twin, view_of_the_same_memory, overlapping_buffer, two_masks, two_views_both_sparse]


@pytest.mark.parametrize("build", SHARED, ids=lambda build: build.__name__)
def test_shared_memory_is_refused_with_the_way_out(build) -> None:
    model = build()
    snapshot = Snapshot(model)
    with pytest.raises(
        LayerRefusedError, match=r"weights='masked' would write the pruned weight into memory that .* reads"
    ):
        densify(model, weights="masked")
    snapshot.assert_unchanged()
    densify(model)  # the other way out


def test_the_way_out_of_the_message_works() -> None:
    model = tied_embedding()
    table = model["table"].weight.detach().clone()
    y = model["head"](X)
    model["head"].weight = nn.Parameter(model["head"].weight.detach().clone())
    densify(model, weights="masked")
    assert_bit_equal(model["head"](X), y)
    assert_bit_equal(model["table"].weight.detach(), table)


def test_disjoint_parts_of_one_buffer_are_not_shared() -> None:
    model = pair()
    flat = torch.randn(512)
    for part, layer in zip(flat.split(256), model, strict=True):
        layer.weight = nn.Parameter(part.view(16, 16))
    sparsify(nn.ModuleList([model[0]]))
    y, other = model(X), model[1].weight.detach().clone()
    densify(model, weights="masked")
    assert_bit_equal(model(X), y)
    assert_bit_equal(model[1].weight.detach(), other)


@pytest.mark.parametrize("mask", ["transposable", "row", "soft", "greedy", "signed_greedy", "held"])
def test_a_weight_that_two_layers_prune_alike_is_pruned_once(mask: str) -> None:
    recipe = {"soft": recipes.s_ste(), "held": recipes.fst(refresh_every=3)}.get(mask)
    model = pair()
    model[1].weight = model[0].weight
    sparsify(model, recipe.config if recipe else SparseConfig(weight=mask))
    if recipe:
        RecipeSchedule(recipe, model, torch.optim.SGD(model.parameters(), lr=0.1), 10)
    if mask == "held":
        with torch.no_grad():
            model[0].weight.copy_(model[0].weight.flip(0))  # the held mask is another than the one it would choose
    y = model(X)
    densify(model, weights="masked")
    assert_bit_equal(model(X), y)


COMPUTED = {
    "weight_norm": lambda layer: parametrizations.weight_norm(layer),
    "spectral_norm hook": lambda layer: nn.utils.spectral_norm(layer),
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
}


@pytest.mark.parametrize("how", COMPUTED)
def test_a_computed_weight_is_refused(how: str) -> None:

    model = pair()
    sparsify(model)
    COMPUTED[how](model[0])
    with pytest.raises(LayerRefusedError, match=r"^0"):
        densify(model, weights="masked")


def test_a_forward_of_hooks_would_go_on_calling_the_sparse_one() -> None:
    model = pair()
    sparsify(model)
    inner = model[0].forward
    model[0].forward = lambda *args: inner(*args)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(LayerRefusedError, match="its forward was replaced on the instance"):
        densify(model)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    del model[0].forward
    assert len(densify(model)) == 2


def test_a_layer_in_a_dense_phase_does_not_prune_alike() -> None:
    model = pair()
    model[1].weight = model[0].weight
    sparsify(model)
    model[1].sparse_enabled = False
    with pytest.raises(LayerRefusedError, match="reads, too"):
        densify(model, weights="masked")


def test_the_row_of_a_layer_in_a_dense_phase_says_that_its_output_changes() -> None:
    model = pair()
    sparsify(model)
    model[1].sparse_enabled = False
    notes = [row.reason for row in densify(model, weights="masked")]
    assert notes == [
        "pruned weight written",
        "pruned weight written, although the layer computed with the dense one (dense phase)",
    ]


@pytest.mark.parametrize("how", ["inference", "expanded"])
def test_weights_that_cannot_be_written_are_found_before_the_first_change(how: str) -> None:
    model = pair()
    sparsify(model)
    if how == "inference":
        with torch.inference_mode():
            model[1].weight = nn.Parameter(torch.randn(16, 16), requires_grad=False)
    else:
        model[1].weight = nn.Parameter(torch.randn(16).expand(16, 16), requires_grad=False)
    before = model[0].weight.detach().clone()
    with pytest.raises(LayerRefusedError, match="cannot write into its weight"):
        densify(model, weights="masked")
    assert_bit_equal(model[0].weight.detach(), before)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_lazy_layers_and_nested_buffers_elsewhere_do_not_matter() -> None:
    model = pair()
    model.append(nn.LazyLinear(4))
    model.register_buffer("ragged", torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]))
    sparsify(model)
    assert len(densify(model, weights="masked")) == 2
