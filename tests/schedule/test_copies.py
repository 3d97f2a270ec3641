"""Copies of scheduled layers: followed, seen, left alone, and given what a recipe holds."""

import copy
import gc
import pickle
import time

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from semisparse import SparseSchedule, recipes, sparsify
from semisparse.errors import NoLayerMatchedError
from semisparse.recipes import RecipeSchedule
from tests.schedule.models import net, train
from tests.support import held_by


def averaged(model: nn.Module) -> nn.Module:
    return AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))


@pytest.mark.parametrize("made", ["before the schedule", "after it", "after a step"])
def test_a_copy_that_follows_switches_along(made: str) -> None:
    model = net()
    ema = averaged(model) if made == "before the schedule" else None
    schedule = SparseSchedule.sparse_then_dense(model, 4, 0.5)
    if made == "after a step":
        schedule.step()
    ema = ema or averaged(model)
    schedule.follow(ema)
    while schedule.phase == "sparse":
        assert ema.module[0].sparse_enabled
        schedule.step()
    assert not ema.module[0].sparse_enabled
    assert "2 layers of copies follow" in repr(schedule)
    schedule.load_state_dict({**schedule.state_dict(), "applied_steps": 0})
    assert ema.module[0].sparse_enabled


def test_a_copy_that_no_schedule_follows_is_seen_and_switched() -> None:
    model = net()
    schedule = SparseSchedule.sparse_then_dense(model, 2, 0.5)
    ema, snapshot = averaged(model), copy.deepcopy(model)
    schedule.unfollow(snapshot)
    with pytest.warns(UserWarning, match=r"2 copies of scheduled layers.*schedule\.follow.*schedule\.unfollow"):
        schedule.step()
    assert not model[0].sparse_enabled
    assert not ema.module[0].sparse_enabled
    assert snapshot[0].sparse_enabled


def test_copies_are_kept_weakly_and_copies_of_copies_are_found() -> None:
    model = net()
    schedule = SparseSchedule.sparse_then_dense(model, 2, 0.5)
    gone, kept = copy.deepcopy(model), copy.deepcopy(copy.deepcopy(model))
    del gone
    gc.collect()
    with pytest.warns(UserWarning, match="2 copies"):
        schedule.step()
    assert not kept[0].sparse_enabled


def test_a_copy_with_a_schedule_of_its_own_is_left_alone() -> None:
    model = net()
    other = copy.deepcopy(model)
    schedule, theirs = (SparseSchedule.sparse_then_dense(m, 2, 0.5) for m in (model, other))
    schedule.step()
    assert other[0].sparse_enabled
    theirs.step()
    assert not other[0].sparse_enabled


def test_what_cannot_follow_is_refused() -> None:
    schedule = SparseSchedule.sparse_then_dense(net(), 2)
    with pytest.raises(NoLayerMatchedError, match="has no semi-sparse layer that could follow"):
        schedule.follow(nn.Linear(16, 16))
    other = nn.ModuleDict({"a": nn.Linear(16, 16)})
    sparsify(other)
    with pytest.raises(NoLayerMatchedError, match="none of the layers of this schedule"):
        schedule.follow(other)


@pytest.mark.parametrize("preset", ["fst", "s_ste"])
def test_a_copy_shares_what_a_recipe_holds(preset: str) -> None:
    recipe = recipes.fst(refresh_every=1 + 1) if preset == "fst" else recipes.s_ste()
    model = nn.Sequential(nn.Linear(16, 16, bias=False))
    sparsify(model, recipe.config)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    schedule = RecipeSchedule(recipe, model, optimizer, 20)
    ema = averaged(model)
    schedule.follow(ema)
    for _ in range(4):
        train(model, optimizer)
        schedule.step()
    assert held_by(ema.module[0]) is held_by(model[0])


def test_a_schedule_is_copied_and_pickled_with_its_model() -> None:
    model = net()
    schedule = SparseSchedule.sparse_then_dense(model, 2, 0.5)
    for clone, twin in (copy.deepcopy((model, schedule)), pickle.loads(pickle.dumps((model, schedule)))):
        optimizer = torch.optim.SGD(clone.parameters(), lr=0.1)
        train(clone, optimizer)
        assert twin.step()
        assert not twin.step()  # it watches the optimizer of its own model
        assert not clone[0].sparse_enabled
        assert model[0].sparse_enabled
    assert schedule.applied_steps == 0


@pytest.mark.parametrize("preset", ["fst", "s_ste"])
@pytest.mark.parametrize("how", ["follow", "by itself"])
def test_a_copy_made_before_the_recipe_gets_what_it_holds(preset: str, how: str) -> None:
    recipe = recipes.fst(refresh_every=2) if preset == "fst" else recipes.s_ste()
    model = nn.Sequential(nn.Linear(16, 16, bias=False))
    sparsify(model, recipe.config)
    ema = averaged(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    schedule = RecipeSchedule(recipe, model, optimizer, 20)
    if how == "follow":
        schedule.follow(ema)
    train(model, optimizer)
    if how == "follow":
        schedule.step()
    else:
        with pytest.warns(UserWarning, match="1 copies of scheduled layers"):
            schedule.step()
    assert held_by(ema.module[0]) is held_by(model[0])
    ema(torch.randn(4, 16))
    schedule.finish()
    assert held_by(model[0]) is None
    assert held_by(ema.module[0]) is None


def test_a_copy_made_in_mid_phase_is_taken_along_at_the_next_refresh() -> None:
    recipe = recipes.fst(refresh_every=2)
    model = nn.Sequential(nn.Linear(16, 16, bias=False))
    sparsify(model, recipe.config)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    schedule = RecipeSchedule(recipe, model, optimizer, 40)
    for number in range(4):
        if number == 3:
            ema = averaged(model)
        train(model, optimizer)
        if number < 3:
            schedule.step()
    with pytest.warns(UserWarning, match="copies"):
        schedule.step()
    assert held_by(ema.module[0]) is held_by(model[0])


def test_thousands_of_layers_are_followed_quickly() -> None:

    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(2000)))
    sparsify(model)
    schedule, other = SparseSchedule.sparse_then_dense(model, 4), copy.deepcopy(model)
    start = time.perf_counter()
    schedule.follow(other)
    assert time.perf_counter() - start < 3


def test_a_copied_schedule_goes_on_comparing_nothing() -> None:
    schedule = SparseSchedule.sparse_then_dense(net(), 4, process_group=False)
    assert copy.deepcopy(schedule)._group is False
