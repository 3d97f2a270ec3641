"""The grammar of select and exclude, names inside wrappers, and suggestions."""

import re

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from semisparse import SemiSparseLinear, sparsify, swap_linear_with_semi_sparse_linear
from semisparse.errors import NoLayerMatchedError
from semisparse.surgery.layers import semi_sparse_layers
from semisparse.surgery.selection import clean_name, closest, linear_layers
from tests.surgery.models import LINEAR_NAMES, Network

SELECTIONS = {
    "substring": ("mlp", [name for name in LINEAR_NAMES if "mlp" in name]),
    "substring_across_dots": ("0.mlp.fc", ["blocks.0.mlp.fc1", "blocks.0.mlp.fc2"]),
    "full_name": ("blocks.1.attn.qkv", ["blocks.1.attn.qkv"]),
    "glob": ("blocks.*.fc1", ["blocks.0.mlp.fc1", "blocks.1.mlp.fc1"]),
    "glob_question_mark": ("*.fc?", [name for name in LINEAR_NAMES if "fc" in name]),
    "glob_choice": ("blocks.[1].mlp.*", ["blocks.1.mlp.fc1", "blocks.1.mlp.fc2"]),
    "regex": (
        re.compile(r"^blocks\.\d+\.(attn\.proj|mlp\.fc2)$"),
        [name for name in LINEAR_NAMES if name.endswith(("proj", "fc2"))],
    ),
    "regex_searches": (re.compile("qk"), ["blocks.0.attn.qkv", "blocks.1.attn.qkv"]),
    "callable": (lambda name, layer: layer.out_features == 24, ["blocks.0.attn.qkv", "blocks.1.attn.qkv"]),
    "list": (["fc1", "blocks.1.*.proj"], ["blocks.0.mlp.fc1", "blocks.1.attn.proj", "blocks.1.mlp.fc1"]),
    "tuple": (("qkv", re.compile("1.*fc2")), ["blocks.0.attn.qkv", "blocks.1.attn.qkv", "blocks.1.mlp.fc2"]),
    "generator": ((name for name in ["qkv", "fc2"]), [n for n in LINEAR_NAMES if n.endswith(("qkv", "fc2"))]),
}


@pytest.mark.parametrize("kind", [kind for kind in SELECTIONS if kind != "generator"])
def test_select_picks_and_exclude_drops_the_same_layers(kind: str) -> None:
    selector, expected = SELECTIONS[kind]
    assert list(sparsify(Network(), select=selector).swapped) == expected
    left = [name for name in LINEAR_NAMES if name not in expected]
    assert list(sparsify(Network(), exclude=selector).swapped) == left


def test_a_generator_is_read_once() -> None:
    selector, expected = SELECTIONS["generator"]
    assert list(sparsify(Network(), select=selector).swapped) == expected


def test_exclude_wins_over_select() -> None:
    report = sparsify(Network(), select=["mlp"], exclude=["fc1"])
    assert report.swapped == ("blocks.0.mlp.fc2", "blocks.1.mlp.fc2")


def test_a_glob_covers_the_whole_name_and_is_case_sensitive() -> None:
    for selector in ("fc*", "mlp?fc1", "BLOCKS.*"):
        with pytest.raises(NoLayerMatchedError):
            sparsify(Network(), select=selector)


def test_the_callable_sees_every_linear_with_its_name() -> None:
    seen = {}
    sparsify(Network(), select=lambda name, layer: seen.setdefault(name, type(layer)) is nn.Linear)
    assert list(seen) == [*LINEAR_NAMES, "head"]
    assert set(seen.values()) == {nn.Linear}


def test_the_example_key_of_torchao_suggests_the_right_name() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(NoLayerMatchedError, match=r"'seq\.0' matches no nn\.Linear of model; closest names: '0'"):
        swap_linear_with_semi_sparse_linear(model, {"seq.0": SemiSparseLinear})
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize(
    ("asked", "first"),
    [
        ("blocks.0.mlp.fc3", "blocks.0.mlp.fc1"),
        ("block.1.attn.proj", "blocks.1.attn.proj"),
        ("model.blocks.1.mlp.fc2", "blocks.1.mlp.fc2"),
        ("blocks.0.attn.qk", "blocks.0.attn.qkv"),
        ("heads", "head"),
    ],
)
def test_the_closest_names_are_suggested(asked: str, first: str) -> None:
    names = [*LINEAR_NAMES, "head"]
    assert closest(asked, names)[0] == first
    assert len(closest(asked, names)) == 3
    with pytest.raises(NoLayerMatchedError) as caught:
        swap_linear_with_semi_sparse_linear(Network(), {asked: SemiSparseLinear})
    assert f"closest names: '{first}'" in str(caught.value)


def test_a_swap_of_nothing_names_the_layers_that_were_asked_for_and_each_reason_once() -> None:
    model = Network()
    sparsify(model, select="blocks")
    with pytest.raises(NoLayerMatchedError) as caught:
        sparsify(model, select=["head", "blocks"])
    first = ", ".join(LINEAR_NAMES[:3])
    assert f"{first} and {len(LINEAR_NAMES) - 3} more: already semi-sparse" in str(caught.value)
    with pytest.raises(NoLayerMatchedError) as caught:
        sparsify(model, select="head")
    assert "change. head: " in str(caught.value) and "not selected" not in str(caught.value)


def test_suggestions_list_each_name_once() -> None:
    assert closest("a.b", ["c", "c", "b"]) == ["b", "c"]


def test_names_lose_what_wrappers_insert() -> None:
    assert clean_name("_orig_mod.blocks.0._checkpoint_wrapped_module.mlp.fc1") == "blocks.0.mlp.fc1"
    assert clean_name("_fsdp_wrapped_module.blocks.0._fsdp_wrapped_module.fc1") == "blocks.0.fc1"
    assert clean_name("module.fc1") == "module.fc1"
    assert clean_name("_orig_mod") == ""


def compiled() -> tuple[nn.Module, str]:
    return torch.compile(Network(), backend="eager"), "_orig_mod."


def checkpointed() -> tuple[nn.Module, str]:
    model = Network()
    model.blocks = nn.ModuleList([checkpoint_wrapper(block) for block in model.blocks])
    return model, ""


def test_a_compiled_sequential_is_swapped_as_any_compiled_model() -> None:
    """torch.compile says that its forward wraps the module, which is no function."""
    model = torch.compile(nn.Sequential(nn.Linear(16, 16)), backend="eager")
    assert list(sparsify(model).swapped) == ["_orig_mod.0"]


@pytest.mark.parametrize("make", [compiled, checkpointed])
def test_layers_inside_wrappers_answer_to_their_plain_names(make) -> None:
    model, _ = make()
    assert list(sparsify(model, select="blocks.0.mlp.*").swapped) == [
        found.name for found in linear_layers(model) if clean_name(found.name).startswith("blocks.0.mlp")
    ]
    swap_linear_with_semi_sparse_linear(model, {"blocks.1.mlp.fc1": SemiSparseLinear})
    assert list(semi_sparse_layers(model)) == ["blocks.0.mlp.fc1", "blocks.0.mlp.fc2", "blocks.1.mlp.fc1"]


@pytest.mark.parametrize("make", [compiled, checkpointed])
def test_layers_inside_wrappers_answer_to_their_full_names_too(make) -> None:
    model, _ = make()
    full = next(
        found.name
        for found in linear_layers(model)
        if found.name.endswith("1.attn.proj") or clean_name(found.name) == "blocks.1.attn.proj"
    )
    assert full != "blocks.1.attn.proj"
    assert swap_linear_with_semi_sparse_linear(model, {full: SemiSparseLinear}).swapped == (full,)


def test_a_ddp_like_module_prefix_is_part_of_the_name_and_suggested() -> None:
    wrapper = nn.Module()
    wrapper.module = Network()
    with pytest.raises(NoLayerMatchedError, match=r"closest names: 'module\.blocks\.0\.mlp\.fc1'"):
        swap_linear_with_semi_sparse_linear(wrapper, {"blocks.0.mlp.fc1": SemiSparseLinear})
    assert sparsify(wrapper, select="blocks.0.mlp.fc1").swapped == ("module.blocks.0.mlp.fc1",)
