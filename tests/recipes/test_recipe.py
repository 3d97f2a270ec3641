"""Recipe and its presets: values, copies, and parts that do not belong together."""

import copy
import pickle
import re
from dataclasses import FrozenInstanceError, asdict
from typing import Any

import pytest

from semisparse import SparseConfig
from semisparse.errors import ConfigError
from semisparse.recipes import PRESETS, Recipe, dinov2, fastest, fst, s_ste, safest, sr_ste, step
from tests.arch.source import ROOT

DOCS = ROOT / "docs" / "recipes.md"
WANTED: dict[str, dict[str, Any]] = {
    "safest": {"mask": "transposable", "sparse_fraction": 0.7},
    "fastest": {"mask": "transposable", "grad_output": "mvue", "precision": "fp8", "sparse_fraction": 0.7},
    "dinov2": {"mask": "transposable", "sparse_fraction": 0.7},
    "sr_ste": {"mask": "transposable", "decay": 2e-4},
    "fst": {
        "mask": "transposable",
        "grad_output": "mvue",
        "decay": 6e-5,
        "refresh_every": 40,
        "sparse_fraction": 5 / 6,
    },
    "s_ste": {"mask": "soft", "grad_output": "mvue"},
    "step": {"mask": "row", "dense_range": (0.1, 0.5)},
}
PLAIN = {"sparse_fraction": 1.0, "decay": 0.0, "refresh_every": 1, "dense_range": None}


@pytest.mark.parametrize("name", WANTED)
def test_a_preset_has_the_settings_that_it_is_known_for(name: str) -> None:
    wanted = dict(WANTED[name])
    operands = {name: wanted.pop(name, None) for name in ("grad_output", "precision")}
    layers = asdict(SparseConfig(weight=wanted.pop("mask"), **operands))
    assert PRESETS[name]().describe() == {"name": name, "config": layers, **PLAIN, **wanted}


def test_the_docs_say_which_products_of_a_preset_are_sparse() -> None:
    rows = re.findall(
        r"^\| ((?:`\w+`(?:, )?)+) \| (\w+(?: fp8)?) \| (\w+(?: fp8)?).*? \| (\w+(?: fp8)?)[^|]* \|$",
        DOCS.read_text(),
        flags=re.MULTILINE,
    )
    said = {name: row[1:] for row in rows for name in re.findall(r"\w+", row[0])}
    assert said == {name: tuple(preset().config.products.values()) for name, preset in PRESETS.items()}
    assert sr_ste(weight="row").config.products["grad_input"] == "dense"


def test_the_presets_are_all_named() -> None:
    presets = {
        "safest": safest,
        "fastest": fastest,
        "dinov2": dinov2,
        "sr_ste": sr_ste,
        "fst": fst,
        "s_ste": s_ste,
        "step": step,
    }
    assert presets == PRESETS


@pytest.mark.parametrize("name", WANTED)
def test_a_preset_takes_a_backend_and_its_own_settings(name: str) -> None:
    assert PRESETS[name](backend="dense").config.backend == "dense"
    assert fst(decay=1e-3, refresh_every=7, sparse_fraction=0.5).describe() == {
        "name": "fst",
        "config": asdict(SparseConfig(grad_output="mvue")),
        "decay": 1e-3,
        "refresh_every": 7,
        "sparse_fraction": 0.5,
        "dense_range": None,
    }
    assert fst(grad_output=None).config == SparseConfig()
    assert fastest(grad_output=None).config == SparseConfig(precision="fp8")
    assert safest(sparse_fraction=0.5).sparse_fraction == fastest(sparse_fraction=0.5).sparse_fraction == 0.5
    assert s_ste(grad_output=None).config == SparseConfig(weight="soft")
    assert sr_ste(weight="row").config.weight == "row"
    assert step(weight="transposable", dense_range=(0.2, 0.3)).dense_range == (0.2, 0.3)


@pytest.mark.parametrize("name", WANTED)
def test_printed_a_recipe_says_which_products_are_sparse_and_when(name: str) -> None:
    recipe = PRESETS[name]()
    said = str(recipe)
    assert said.startswith(f"{name}: ")
    assert all(f"{product} {how}" in said for product, how in recipe.config.products.items())
    assert ("dense first" in said) == (recipe.dense_range is not None)
    assert ("then dense" in said) == (recipe.sparse_fraction < 1)
    assert ("decay" in said) == (recipe.decay > 0)
    assert ("masks held" in said) == (recipe.refresh_every > 1)


def test_a_recipe_cannot_be_changed_but_compared_copied_and_pickled() -> None:
    recipe = fst()
    with pytest.raises(FrozenInstanceError):
        recipe.decay = 1.0
    for other in (copy.deepcopy(recipe), copy.copy(recipe), pickle.loads(pickle.dumps(recipe)), fst()):
        assert other == recipe and hash(other) == hash(recipe)
    assert recipe != fst(decay=1e-4)


def test_a_range_becomes_a_pair_of_floats() -> None:
    assert step(dense_range=[0, 1]).dense_range == (0.0, 1.0)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "name": ({"name": None}, "name=None must be a non-empty string"),
    "empty name": ({"name": ""}, "name='' must be a non-empty string"),
    "config": ({"config": "row"}, "config='row' must be a SparseConfig"),
    "fraction above": ({"sparse_fraction": 1.1}, r"sparse_fraction=1\.1 must lie between 0 and 1"),
    "fraction nan": ({"sparse_fraction": float("nan")}, "sparse_fraction=nan must lie between 0 and 1"),
    "fraction bool": ({"sparse_fraction": True}, "sparse_fraction=True must lie between 0 and 1"),
    "fraction text": ({"sparse_fraction": "0.5"}, r"sparse_fraction='0\.5' must lie between 0 and 1"),
    "decay below": ({"decay": -1e-5}, "decay=-1e-05 must be a number, 0 or more"),
    "decay inf": ({"decay": float("inf")}, "decay=inf must be a number, 0 or more"),
    "decay text": ({"decay": "much"}, "decay='much' must be a number, 0 or more"),
    "refresh 0": ({"refresh_every": 0}, "refresh_every=0 must be a whole number of applied steps, 1 or more"),
    "refresh float": ({"refresh_every": 40.0}, r"refresh_every=40\.0 must be a whole number"),
    "refresh bool": ({"refresh_every": True}, "refresh_every=True must be a whole number"),
    "range of one": ({"dense_range": (0.5,)}, r"dense_range=\(0\.5,\) must be two shares"),
    "range number": ({"dense_range": 0.5}, r"dense_range=0\.5 must be two shares"),
    "range turned": ({"dense_range": (0.5, 0.1)}, r"dense_range=\(0\.5, 0\.1\) must be two shares"),
    "range above": ({"dense_range": (0.5, 1.5)}, r"dense_range=\(0\.5, 1\.5\) must be two shares"),
    "range nan": ({"dense_range": (float("nan"), 0.5)}, r"dense_range=\(nan, 0\.5\) must be two shares"),
    "range of nothing": ({"dense_range": (0, 0)}, r"dense_range=\(0, 0\) must be two shares of the steps, .* not 0"),
    "range of text": ({"dense_range": ("a", "b")}, r"dense_range=\('a', 'b'\) must be two shares"),
    "activation": ({"config": SparseConfig(weight=None, activation="transposable")},
                   "config.weight=None: recipes prune weights"),
    "rows held": ({"config": SparseConfig(weight="row"), "refresh_every": 2}, "refresh_every=2 holds masks fixed, "
                  "which config.weight='row' cannot be: use weight='transposable' or refresh_every=1"),
    "soft held": ({"config": SparseConfig(weight="soft"), "refresh_every": 2}, "refresh_every=2 holds masks fixed"),
    "soft decay": ({"config": SparseConfig(weight="soft"), "decay": 1e-4},
                   r"decay=0\.0001: config\.weight='soft' .* use decay=0"),
    "soft after dense": ({"config": SparseConfig(weight="soft"), "dense_range": (0.1, 0.5)}, "config.weight='soft' "
                         "takes its scale at the start, .* use weight='row' or no dense_range"),
    "two plans": ({"dense_range": (0.1, 0.5), "sparse_fraction": 0.5}, r"sparse_fraction=0\.5: with dense_range .* "
                  "leave sparse_fraction at 1"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_belong_together_is_refused_with_the_way_out(case: str) -> None:
    settings, message = BAD[case]
    with pytest.raises(ConfigError, match=message):
        Recipe(**{"name": "mine", **settings})


def test_presets_refuse_the_same() -> None:
    with pytest.raises(ConfigError, match="weight='soft'"):
        sr_ste(weight="soft")
    with pytest.raises(ConfigError, match="weight='soft'"):
        step(weight="soft")
    with pytest.raises(ConfigError, match="backend='fast'"):
        dinov2(backend="fast")
