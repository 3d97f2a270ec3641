"""A run that was stopped goes on bit for bit, and a step that a scaler skipped leaves no trace."""

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from semisparse.errors import ScheduleError
from semisparse.recipes import fst, s_ste, step
from semisparse.testing import assert_bit_equal
from tests.recipes.training import DECAY, RECIPES, TOTAL, Run, assert_same
from tests.support import held_by

# Settings of runs beside the recipe's name: AutoSwitch at its first look and at the latest step; optimizers; scalers.
OVERFLOWS = frozenset({0, 2, 5, 6, 13})
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in RECIPES},
    "step at the latest": ("step", {"eps": 1e-30}),
    "fst scaled": ("fst", {"scaled": True}),
    "fst scaled and fused": ("fst", {"scaled": True, "fused": True}),
    "step scaled": ("step", {"scaled": True}),
    "s_ste with sgd": ("s_ste", {"optimizer": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9)}),
}


def start(kind: str) -> Run:
    name, settings = RUNS[kind]
    return Run(RECIPES[name](), **settings)


def overflows(run: Run) -> frozenset[int]:
    return OVERFLOWS if run.scaler is not None else frozenset()


@cache
def whole(kind: str) -> tuple[Tensor, dict[str, Any]]:
    """Losses and last states of the run that was not stopped."""
    run = start(kind)
    losses = run.steps(0, TOTAL, overflows(run))
    return torch.stack(losses), copy.deepcopy(run.state())


# Around the refreshes of held masks, the switches and the ends of phases, beside the ends of the run.
ENDS = (0, 1, 12, TOTAL - 1, TOTAL)
STOPS: dict[str, tuple[int, ...]] = {
    "dinov2": (16, 17, 18),
    "fst": (2, 3, 4, 19, 20, 21),
    "step": (9, 10, 11),
    "held after a dense start": (9, 10, 11, 13, 14, 15),
    "step at the latest": (17, 18, 19),
    "fst scaled": (3, 4, 5, 6, 7, 8, 13, 14),
    "step scaled": (3, 6, 14, 15, 16),
}
CASES = [(kind, stop) for kind in RUNS for stop in (*ENDS, *STOPS.get(kind, (17, 18, 19)))]


@pytest.mark.parametrize(("kind", "stop"), CASES)
def test_resuming_after_any_step_continues_bit_for_bit(kind: str, stop: int, tmp_path: Any) -> None:
    first, second = start(kind), start(kind)
    begun = first.steps(0, stop, overflows(first))
    first.save(tmp_path / "run.pt")
    second.load(tmp_path / "run.pt")
    assert_same(second.state(), torch.load(tmp_path / "run.pt", weights_only=True))
    assert (second.schedule.phase, second.schedule.phases) == (first.schedule.phase, first.schedule.phases)
    continued = second.steps(stop, TOTAL, overflows(second))
    losses, state = whole(kind)
    assert_bit_equal(torch.stack(begun + continued), losses)
    assert_same(second.state(), state)


@pytest.mark.parametrize("kind", RUNS)
def test_the_order_of_loading_does_not_matter(kind: str, tmp_path: Any) -> None:
    first, second = start(kind), start(kind)
    first.steps(0, 11, overflows(first))
    first.save(tmp_path / "run.pt")
    state = torch.load(tmp_path / "run.pt", weights_only=True)
    for name in reversed(second.parts()):
        second.parts()[name].load_state_dict(state[name])
    second.steps(11, TOTAL, overflows(second))
    assert_same(second.state(), whole(kind)[1])


@pytest.mark.parametrize("kind", RUNS)
def test_a_run_that_is_set_back_repeats_itself(kind: str, tmp_path: Any) -> None:
    """Loading an earlier state into the same objects: the switch and the dense tail are undone, too."""
    run = start(kind)
    run.steps(0, 7, overflows(run))
    run.save(tmp_path / "run.pt")
    run.steps(7, TOTAL, overflows(run))
    run.load(tmp_path / "run.pt")
    run.steps(7, TOTAL, overflows(run))
    assert_same(run.state(), whole(kind)[1])


@pytest.mark.parametrize("kind", ["fst", "step", "s_ste"])
def test_a_state_is_a_copy(kind: str) -> None:
    run = start(kind)
    run.steps(0, 9)
    state = run.schedule.state_dict()
    before = copy.deepcopy(state)
    run.steps(9, 15)
    assert_same(state, before)


FUSED = [(name, fused) for name in RECIPES for fused in (True, False) if not (fused and RECIPES[name]().dense_range)]


@pytest.mark.parametrize(("name", "fused"), FUSED)
def test_a_skipped_step_changes_nothing(name: str, fused: bool) -> None:
    run = Run(RECIPES[name](), scaled=True, **({"fused": True} if fused else {}))
    for number in range(TOTAL):
        run.steps(number, number + 1)
        before = copy.deepcopy(run.state())
        held = [module.pruned_weight() for module in run.model if hasattr(module, "pruned_weight")]
        run.steps(100 + number, 101 + number, frozenset({100 + number}))
        after = run.state()
        assert after["scaler"].pop("scale") == before["scaler"].pop("scale") / 2
        after["scaler"].pop("_growth_tracker"), before["scaler"].pop("_growth_tracker")
        before["schedule"].pop("last_scale"), after["schedule"].pop("last_scale")
        assert_same(after, before)
        for module, pruned in zip([m for m in run.model if hasattr(m, "pruned_weight")], held, strict=True):
            assert_bit_equal(module.pruned_weight(), pruned)


@pytest.mark.parametrize("fused", [True, False])
def test_held_masks_age_by_applied_steps_only(fused: bool) -> None:
    run = Run(fst(decay=DECAY, refresh_every=3), scaled=True, fused=fused)
    applied = number = 0
    masks = run.schedule.state_dict()["masks"]
    while applied < 9:
        skip = number in (0, 1, 4, 5, 6, 9)
        run.steps(number, number + 1, frozenset({number}) if skip else frozenset())
        number, applied = number + 1, applied + (not skip)
        state = run.schedule.state_dict()
        assert state["age"] == applied % 3
        if skip or applied % 3:
            assert_same(state["masks"], masks)
        else:
            assert any(not torch.equal(state["masks"][name], mask) for name, mask in masks.items())
        masks = state["masks"]


def change(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda state: {**state, **changes}


def drop(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda state: {key: value for key, value in state.items() if key != name}


def inside(name: str, **changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda state: {**state, name: {**state[name], **changes}}


BAD_STATES: dict[str, tuple[str, Callable[[dict[str, Any]], Any], str]] = {
    "none": ("fst", lambda state: None, "state is a NoneType; pass what state_dict"),
    "list": ("fst", lambda state: [1], "state is a list; pass what state_dict"),
    "empty": ("fst", lambda state: {}, "state was saved with recipe=None, this schedule has .*; start it with"),
    "other recipe": ("fst", change(recipe=s_ste().describe()), "state was saved with recipe=.*'s_ste'"),
    "other decay": ("fst", inside("recipe", decay=1.0), r"state was saved with recipe=.*'decay': 1\.0"),
    "other total": ("fst", change(total_steps=23), "state was saved with total_steps=23, this schedule has 24"),
    "no total": ("step", drop("total_steps"), "state was saved with total_steps=None, this schedule has 24"),
    "no masks": ("fst", drop("masks"), r"state\['masks'\] does not name the layers of this model"),
    "no scales": ("s_ste", drop("scales"), r"state\['scales'\] does not name the layers of this model"),
    "other layers": ("fst", inside("masks", more=torch.zeros(1)), r"state\['masks'\] does not name the layers"),
    "other shape": (
        "fst",
        inside("masks", **{"2": torch.zeros(2, 2, dtype=torch.int16)}),
        r"state\['masks'\]\['2'\] must be torch.int16 of shape \(2, 4\)",
    ),
    "full tiles": ("fst", inside("masks", **{"2": torch.full((2, 4), -1, dtype=torch.int16)}), "not 2:4 both ways"),
    "row-wise tiles": ("fst", inside("masks", **{"2": torch.full((2, 4), 0x3333, dtype=torch.int16)}), "not 2:4 both"),
    "other dtype": ("fst", inside("masks", **{"2": torch.zeros(2, 4)}), r"state\['masks'\]\['2'\] must be torch.int16"),
    "no tensor": ("s_ste", inside("scales", **{"0": 1.5}), r"state\['scales'\]\['0'\] must be torch.float32 of shape"),
    "age too high": ("fst", change(age=3), r"state\['age'\]=3 must be a whole number from 0 to 2"),
    "age bool": ("fst", change(age=True), r"state\['age'\]=True must be"),
    "no age": ("fst", drop("age"), r"state\['age'\]=None must be"),
    "was_sparse": ("fst", change(was_sparse=1), r"state\['was_sparse'\]=1 must be true or false"),
    "whole changes": ("step", change(changes=torch.zeros(5, dtype=torch.int64)), "must hold 5 fp32 numbers"),
    "other window": (
        "step",
        change(changes=torch.zeros(9)),
        r"state\['changes'\] must hold 5 fp32 numbers; resume with the same beta2",
    ),
    "no changes": ("step", drop("changes"), r"state\['changes'\] must hold 5 fp32 numbers"),
    "switch too late": ("step", change(switched_at=19), r"state\['switched_at'\]=19 must be a step, 1 to 18, or None"),
    "switch too early": ("step", change(switched_at=0), r"state\['switched_at'\]=0 must be a step"),
    "switch true": ("step", change(switched_at=True), r"state\['switched_at'\]=True must be a step"),
    "other switch": ("step", change(switched_at=9), r"state has phases .*, this schedule .*; build it with the same"),
    "no phases": ("dinov2", drop("phases"), "state with .* is not a saved SparseSchedule: KeyError"),
    "counter": ("fst", change(applied_steps=-1), r"state\['applied_steps'\]=-1"),
    "scale": ("step", change(last_scale="1"), r"state\['last_scale'\]='1'"),
}


@pytest.mark.parametrize("case", BAD_STATES)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(case: str) -> None:
    name, damage, message = BAD_STATES[case]
    saved, run = start(name), start(name)
    saved.steps(0, 13)
    run.steps(0, 4)
    before, flags = copy.deepcopy(run.state()), [getattr(m, "sparse_enabled", None) for m in run.model]
    with pytest.raises(ScheduleError, match=message):
        run.schedule.load_state_dict(damage(saved.schedule.state_dict()))
    assert_same(run.state(), before)
    assert [getattr(m, "sparse_enabled", None) for m in run.model] == flags
    run.steps(4, TOTAL)
    assert_same(run.state(), whole(name)[1])


def test_tensors_of_a_state_are_not_spelt_out_in_a_message() -> None:
    run = start("fst")
    with pytest.raises(ScheduleError) as caught:
        run.schedule.load_state_dict(drop("last_scale")(run.schedule.state_dict()))
    assert "tensor" not in str(caught.value) and "'masks'" in str(caught.value)


def test_a_state_of_other_settings_of_the_optimizer_is_noticed() -> None:
    saved, run = Run(step(dense_range=(0.1, 0.75))), Run(step(dense_range=(0.1, 0.75)), betas=(0.9, 0.9))
    message = r"state\['changes'\] must hold 10 fp32 numbers; resume with the same beta2"
    with pytest.raises(ScheduleError, match=message):
        run.schedule.load_state_dict(saved.schedule.state_dict())


def test_loading_replaces_what_was_frozen_at_the_start_of_a_fresh_model() -> None:
    """A fresh model has other weights, so its recipe started with other masks and scales."""
    for name, key in (("fst", "masks"), ("s_ste", "scales")):
        first, second = start(name), start(name)
        first.steps(0, 2)
        with torch.no_grad():
            for module in second.model:
                if isinstance(module, nn.Linear):
                    module.weight.normal_()
        held = [held_by(module) for module in second.model if held_by(module) is not None]
        second.schedule.load_state_dict(first.schedule.state_dict())
        assert_same(second.schedule.state_dict(), first.schedule.state_dict())
        for tensor, (layer, saved) in zip(held, first.schedule.state_dict()[key].items(), strict=True):
            assert held_by(second.layer(layer)) is tensor  # the address stays, for a captured step
            assert_bit_equal(tensor, saved)
