"""SparseSchedule under mixed precision: only applied steps count, whatever an optimizer's hooks say."""

import pytest
import torch
from torch import nn

from semisparse import Phase, SparseSchedule, sparsify
from semisparse.errors import ScheduleError


class Run:
    """Training with a CPU GradScaler in which chosen steps see an infinite gradient."""

    def __init__(self, *, fused: bool = True, **scaler: float) -> None:
        self.model = nn.Sequential(nn.Linear(8, 8))
        sparsify(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1, fused=fused)
        self.scaler = torch.amp.GradScaler("cpu", **{"init_scale": 2.0**10, **scaler})
        self.schedule = SparseSchedule(self.model, [Phase("sparse", 3), Phase("dense", 100)])
        self.hooks = 0
        self.optimizer.register_step_post_hook(self._hook)

    def _hook(self, *_: object) -> None:
        self.hooks += 1

    def step(self, *, overflow: bool = False) -> tuple[bool, bool]:
        """Whether the weights moved, and whether the schedule counted the step."""
        before = self.model[0].weight.detach().clone()
        self.optimizer.zero_grad()
        self.scaler.scale(self.model(torch.randn(4, 8)).square().mean()).backward()
        if overflow:
            self.model[0].weight.grad[0, 0] = float("inf")
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return not torch.equal(before, self.model[0].weight), self.schedule.step(self.scaler)


OVERFLOWS = {"never": [], "first": [0], "second": [1], "middle": [2, 3], "often": [0, 1, 4, 6, 7], "always": range(9)}
SETTINGS = {
    "default": {},
    "grows_every_step": {"growth_interval": 1},
    "grows_every_second_step": {"growth_interval": 2},
    "grows_as_it_shrinks": {"growth_interval": 1, "growth_factor": 4.0, "backoff_factor": 0.25},
}


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("pattern", OVERFLOWS)
def test_exactly_the_applied_steps_count(pattern: str, setting: str, fused: bool) -> None:
    run = Run(fused=fused, **SETTINGS[setting])
    applied = 0
    for step in range(9):
        assert run.model[0].sparse_enabled is (applied < 3)
        moved, counted = run.step(overflow=step in OVERFLOWS[pattern])
        assert moved is (step not in OVERFLOWS[pattern])
        assert counted is moved
        applied += counted
        assert run.schedule.applied_steps == applied


def test_the_step_hook_of_a_fused_optimizer_fires_for_skipped_steps() -> None:
    run = Run(fused=True)
    results = [run.step(overflow=step == 1) for step in range(4)]
    assert [moved for moved, _ in results] == [True, False, True, True]
    assert run.hooks == 4  # this is why the schedule's own hook also reads found_inf
    assert run.schedule.applied_steps == 3


def test_a_skipped_step_does_not_end_a_phase() -> None:
    run = Run()
    run.step()
    run.step()
    run.step(overflow=True)
    assert run.schedule.phase == "sparse"
    assert run.model[0].sparse_enabled
    run.step()
    assert run.schedule.phase == "dense"
    assert not run.model[0].sparse_enabled


def test_a_disabled_scaler_never_skips() -> None:
    run = Run(enabled=False)
    assert [run.step() for _ in range(3)] == [(True, True)] * 3
    assert run.schedule.phase == "dense"


@pytest.mark.parametrize("other", [3, "epoch", torch.tensor(0.5)])
def test_what_is_no_scaler_is_refused_and_nothing_counted(other: object) -> None:
    run = Run()
    with pytest.raises(ScheduleError, match=r"the argument must be a torch\.amp\.GradScaler"):
        run.schedule.step(other)
    assert run.schedule.applied_steps == 0


def test_without_a_scaler_every_call_counts() -> None:
    run = Run()
    assert all(run.schedule.step() for _ in range(4))
    assert run.schedule.applied_steps == 4


@pytest.mark.parametrize("stop", range(1, 7))
def test_a_resumed_run_still_knows_the_last_scale(stop: int) -> None:
    pattern = [False, True, False, True, True, False, False]
    whole = Run()
    counted = [whole.step(overflow=overflow)[1] for overflow in pattern]
    run, resumed = Run(), Run()
    begun = [run.step(overflow=overflow)[1] for overflow in pattern[:stop]]
    resumed.scaler.load_state_dict(run.scaler.state_dict())
    resumed.schedule.load_state_dict(run.schedule.state_dict())
    assert begun + [resumed.step(overflow=overflow)[1] for overflow in pattern[stop:]] == counted


def test_a_schedule_that_meets_a_scaler_late_judges_its_first_step_rightly() -> None:
    for overflow in (False, True):
        run = Run()
        for early in (True, False, False):  # the scale is below its initial value by now
            run.step(overflow=early)
        run.schedule = SparseSchedule(run.model, [Phase("sparse", 5)])
        moved, counted = run.step(overflow=overflow)
        assert counted is moved


def test_a_schedule_set_back_beside_a_running_scaler_judges_by_the_scale_it_saw_last() -> None:
    # The scale falls, then grows in one applied step to less than it began with. Without the last scale seen, that step
    # looks like a skipped one: a count of zero and a scale below the initial one.
    run = Run(growth_interval=1, growth_factor=1.5, backoff_factor=0.5)
    run.step(overflow=True)
    restored = SparseSchedule(run.model, [Phase("sparse", 3), Phase("dense", 100)])
    restored.load_state_dict(run.schedule.state_dict())
    run.schedule = restored
    assert run.step() == (True, True)
