"""What plain sparsify(model) leaves dense by role and name, how the report says it, and who can take it anyway."""

from typing import get_args, get_type_hints

import pytest
import torch
from torch import nn

import semisparse
from semisparse import SemiSparseLinear, SparseConfig, densify, sparsify, swap_linear_with_semi_sparse_linear
from semisparse.errors import NoLayerMatchedError


class Model(nn.Module):
    """A layer of each role, beside layers whose names only resemble one."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Sequential(nn.Linear(16, 16))
        self.body = nn.ModuleDict({name: nn.Linear(16, 16) for name in ("headline", "overhead", "classifiers", "fc")})
        self.attn = nn.ModuleDict(
            {
                "lora_A": nn.ModuleDict({"default": nn.Linear(16, 4, bias=False)}),
                "lora_B": nn.ModuleDict({"default": nn.Linear(4, 16, bias=False)}),
            }
        )
        self.classifier, self.head, self.lm_head = (nn.Linear(16, 16) for _ in range(3))
        self.table, self.output = nn.Embedding(16, 16), nn.Linear(16, 16, bias=False)
        self.output.weight = self.table.weight
        self.last = nn.Linear(16, 16)


LEFT = {
    "patch_embed.0": "'patch_embed' says a patch embedding",
    "attn.lora_A.default": "'lora_A' says an adapter of LoRA",
    "attn.lora_B.default": "'lora_B' says an adapter of LoRA",
    "classifier": "'classifier' says an output head",
    "head": "'head' says an output head",
    "lm_head": "'lm_head' says an output head",
    "output": "its weight is tied to an embedding",
}
TAKEN = ("body.headline", "body.overhead", "body.classifiers", "body.fc", "last")


def test_roles_stay_dense_and_the_report_says_why() -> None:
    report = sparsify(Model())
    assert report.swapped == TAKEN  # by name, never by position
    assert report.skipped.keys() == LEFT.keys()
    for name, reason in LEFT.items():
        assert reason in report.skipped[name]
        assert "name it in select to swap it" in report.skipped[name]
        assert report.skipped[name] in str(report)


@pytest.mark.parametrize("name", LEFT)
def test_select_takes_them(name: str) -> None:
    assert sparsify(Model(), select=lambda found, layer: found == name).swapped == (name,)


def test_torchaos_own_call_takes_them() -> None:
    model = Model()
    report = swap_linear_with_semi_sparse_linear(model, dict.fromkeys(LEFT, SemiSparseLinear))
    assert set(report.swapped) == set(LEFT)


def test_a_model_that_is_all_head_says_so() -> None:
    with pytest.raises(NoLayerMatchedError, match=r"head: left dense by its name.*name it in select"):
        sparsify(nn.ModuleDict({"head": nn.Linear(16, 16)}))


def test_a_view_of_an_embedding_is_tied_too() -> None:
    model = nn.ModuleDict(
        {"table": nn.Embedding(16, 16), "out": nn.Linear(16, 16, bias=False), "fc": nn.Linear(16, 16)}
    )
    model["out"].weight = nn.Parameter(model["table"].weight.data)
    assert sparsify(model).swapped == ("fc",)


@pytest.mark.parametrize("exclude", ["odd", ["odd", "fc"]])
def test_an_excluded_layer_says_excluded_and_nothing_else(exclude) -> None:
    model = nn.ModuleDict({"odd": nn.Linear(6, 6), "fc": nn.Linear(16, 16), "more": nn.Linear(16, 16)})
    assert sparsify(model, exclude=exclude).skipped["odd"] == "excluded"


def test_a_layer_that_was_not_selected_also_says_that_it_could_not_be() -> None:
    model = nn.ModuleDict({"odd": nn.Linear(6, 6), "fc": nn.Linear(16, 16), "more": nn.Linear(16, 16)})
    skipped = sparsify(model, select="fc").skipped
    assert skipped["odd"].startswith("not selected, and could not be swapped: in_features=6")
    assert skipped["more"] == "not selected"


class Experts(nn.Module):
    """Three-dimensional experts, as transformers stores them."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.router = nn.Parameter(torch.randn(8, 64, 16)), nn.Linear(16, 8)


def test_the_report_says_what_lies_outside_linear() -> None:
    last = str(sparsify(Experts())).splitlines()[-1]
    assert last.startswith("98% of the parameters lie outside nn.Linear: ")
    assert "'up' of Experts (8 x 64 x 16" in last
    assert "outside nn.Linear" not in str(sparsify(nn.Sequential(nn.Linear(16, 16))))


def test_densify_names_its_choices_in_its_type() -> None:
    hint = get_type_hints(densify)["weights"]
    assert set(get_args(hint)) == {"dense", "masked"}


def test_recipes_are_an_attribute_of_the_package() -> None:
    assert semisparse.recipes.fst().name == "fst"


def test_big_models_are_looked_at_quickly() -> None:
    import time

    block = lambda: nn.TransformerDecoderLayer(16, 4, 32)  # noqa: E731
    model = nn.Sequential(*(nn.ModuleDict({"a": nn.Linear(16, 16), "block": block()}) for _ in range(100)))
    start = time.perf_counter()
    report = sparsify(model, SparseConfig(backend="dense"))
    assert len(report) == 500
    assert time.perf_counter() - start < 10
