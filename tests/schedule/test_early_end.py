"""Ending a sparse phase early: what follows is dense, with every recipe and after resuming."""

import json

import pytest
import torch

from semisparse import Phase, SparseSchedule
from semisparse.errors import ScheduleError
from semisparse.recipes import RecipeSchedule
from semisparse.testing import assert_bit_equal
from tests.recipes.training import RECIPES, SPARSE, TOTAL, Run, assert_same
from tests.schedule.models import net

PHASES = (Phase("dense", 1), Phase("sparse", 4), Phase("dense", 1), Phase("sparse", 2))


def kinds(schedule: SparseSchedule, steps: int) -> str:
    seen = ""
    for _ in range(steps):
        assert {layer.sparse_enabled for layer in schedule._layers.by_name.values()} == {schedule.phase == "sparse"}
        seen += schedule.phase[0]
        schedule.step()
    return seen


def test_the_remaining_steps_are_dense_and_the_state_says_so() -> None:
    schedule = SparseSchedule(net(), PHASES)
    assert kinds(schedule, 3) == "dss"
    before = schedule.state_dict()
    assert schedule.ended_at is None
    schedule.end_sparse_phase()
    assert schedule.phases == (Phase("dense", 1), Phase("sparse", 2), Phase("dense", 5))
    assert schedule.ended_at == 3
    state = json.loads(json.dumps(schedule.state_dict()))
    assert kinds(schedule, 8) == 8 * "d"
    other = SparseSchedule(net(), PHASES)
    other.load_state_dict(state)
    assert other.phases == schedule.phases and other.state_dict() == state
    assert kinds(other, 8) == 8 * "d"
    other.load_state_dict(before)  # back before the end
    assert other.phases == PHASES and kinds(other, 5) == "ssdss"


def test_a_state_of_an_earlier_version_has_no_early_end() -> None:
    schedule = SparseSchedule(net(), PHASES)
    state = schedule.state_dict()
    del state["ended_at"]
    schedule.load_state_dict(state)
    assert schedule.ended_at is None


def test_beyond_the_last_phase_its_kind_ends_too() -> None:
    schedule = SparseSchedule(net(), [Phase("sparse", 2)])
    assert kinds(schedule, 4) == "ssss"
    schedule.end_sparse_phase()
    other = SparseSchedule(net(), [Phase("sparse", 2)])
    other.load_state_dict(schedule.state_dict())
    assert kinds(schedule, 3) == kinds(other, 3) == "ddd"


@pytest.mark.parametrize("at", [-1, 1.5, True, 0, 5])
def test_an_end_that_is_in_no_sparse_phase_is_refused(at: object) -> None:
    schedule = SparseSchedule(net(), PHASES)
    state = schedule.state_dict()
    with pytest.raises(ScheduleError, match=rf"state\['ended_at'\]={at}"):
        schedule.load_state_dict(state | {"ended_at": at})
    assert schedule.state_dict() == state


def test_there_must_be_a_sparse_phase_to_end() -> None:
    schedule = SparseSchedule(net(), PHASES)
    with pytest.raises(ScheduleError, match="in a dense phase, after 0 applied steps"):
        schedule.end_sparse_phase()
    assert schedule.phases == PHASES


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_resume_bit_for_bit_after_an_early_end(name: str, tmp_path) -> None:
    early = 19 if "step" in name or "dense start" in name else 7
    run, other = Run(RECIPES[name]()), Run(RECIPES[name]())
    run.steps(0, early)
    run.schedule.end_sparse_phase()
    run.save(tmp_path / "run.pt")
    other.load(tmp_path / "run.pt")
    losses = [each.steps(early, TOTAL) for each in (run, other)]
    assert_bit_equal(torch.stack(losses[0]), torch.stack(losses[1]))
    assert_same(run.state(), other.state())
    assert isinstance(run.schedule, RecipeSchedule) and run.schedule.phase == "dense"
    x = torch.randn(4, 8)
    plain = run.layer(SPARSE[0])
    assert_bit_equal(plain(x), torch.nn.functional.linear(x, plain.weight, plain.bias))
    run.schedule.finish()
    with pytest.raises(ScheduleError, match="has ended the recipe"):
        run.schedule.end_sparse_phase()
