"""LossGuard: what trips it and what does not, its reference, and resuming. Losses are planted."""

import json
import logging
import math
from collections.abc import Callable, Mapping

import pytest
import torch

from semisparse import LossGuard, Phase, SparseSchedule
from semisparse.errors import ConfigError, ScheduleError
from tests.schedule.models import net

SETTINGS = {"smoothing": 20, "interval": 5, "patience": 2}
STEPS = 400


def healthy(step: int) -> float:
    """A loss that falls to a plateau."""
    return 2 + 3 * step**-0.5


def noisy(curve: Callable[[int], float], seed: int, share: float = 0.1) -> dict[int, float]:
    """Losses of steps 1 to STEPS with independent noise of a share of each."""
    noise = torch.randn(STEPS, generator=torch.Generator().manual_seed(seed)).tolist()
    return {step: curve(step) * (1 + share * noise[step - 1]) for step in range(1, STEPS + 1)}


def schedule_of(*phases: Phase) -> SparseSchedule:
    return SparseSchedule(net(), phases or (Phase("sparse", STEPS), Phase("dense", 10)))


def fed(guard: LossGuard, schedule: SparseSchedule, losses: Mapping[int, float], stop: int = STEPS) -> int | None:
    """Steps through losses up to `stop`; the step at which update() returned True."""
    for step in range(schedule.applied_steps + 1, stop + 1):
        schedule.resume_at(step)
        if guard.update(torch.tensor(losses[step])):
            return step
    return None


@pytest.mark.parametrize("seed", range(5))
def test_a_healthy_run_never_trips(seed: int) -> None:
    dense = noisy(healthy, seed + 100)
    for reference in (None, dense):
        schedule = schedule_of()
        guard = LossGuard(schedule, reference, **SETTINGS)
        assert fed(guard, schedule, noisy(healthy, seed)) is None
        assert guard.report().step == STEPS
        assert schedule.phase == "dense" and schedule.ended_at is None  # the planned end


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("own", [True, False])
def test_a_planted_divergence_makes_the_remaining_steps_dense(
    seed: int, own: bool, caplog: pytest.LogCaptureFixture
) -> None:
    schedule = schedule_of()
    guard = LossGuard(schedule, None if own else {step: healthy(step) for step in range(1, STEPS + 1)}, **SETTINGS)
    losses = noisy(lambda step: healthy(step) * (1 + 0.02 * max(0, step - 200)), seed)
    with caplog.at_level(logging.WARNING, "semisparse"):
        tripped = fed(guard, schedule, losses)
    assert tripped is not None and 200 < tripped <= 260
    assert (schedule.phase, schedule.ended_at) == ("dense", tripped)
    assert not any(layer.sparse_enabled for layer in schedule._layers.by_name.values())
    report = guard.report()
    assert report.tripped_at == report.step == tripped and report.above == SETTINGS["patience"]
    assert report.loss > report.limit > report.reference
    (record,) = caplog.records
    assert f"limit {report.limit:.6g}" in record.getMessage()
    assert f"ended at step {tripped}" in record.getMessage()
    assert fed(guard, schedule, losses) is None  # nothing is left to end


def test_a_run_that_lags_behind_its_reference_trips() -> None:
    """By less than it falls: the run itself as reference sees nothing."""
    losses = {step: healthy(step) * (1.03 if step > 100 else 1) for step in range(1, STEPS + 1)}
    for reference, trips in ((None, False), ({1: healthy(1)} | {s: healthy(s) for s in range(2, STEPS + 1)}, True)):
        schedule = schedule_of()
        guard = LossGuard(schedule, reference, tolerance=0.02, **SETTINGS)
        assert (fed(guard, schedule, losses) is not None) == trips


def test_the_limit_is_what_the_docstring_says() -> None:
    """Averages and noise in one formula each, from all losses at once."""
    losses, dense = noisy(healthy, 0), noisy(healthy, 1)
    schedule = schedule_of()
    guard = LossGuard(schedule, dense, tolerance=0.1, **SETTINGS)
    fed(guard, schedule, losses, 50)
    report = guard.report()
    ours, theirs = (
        torch.tensor([curve[step] for step in range(1, 51)], dtype=torch.float64).reshape(10, 5).mean(dim=1)
        for curve in (losses, dense)
    )
    ages = torch.arange(9, -1, -1, dtype=torch.float64)
    weights, slowly = (1 - 1 / 20) ** (5 * ages), (1 - 1 / 20) ** (5 * ages[1:] / 10)
    reference = (theirs @ weights / weights.sum()).item()
    gap = ours - theirs
    noise = ((gap.diff() ** 2 / 2) @ slowly / slowly.sum()).sqrt()
    error = (noise * weights.norm() / weights.sum()).item()
    assert report.loss == pytest.approx((ours @ weights / weights.sum()).item())
    assert report.reference == pytest.approx(reference)
    assert report.limit == pytest.approx(1.1 * reference + 6 * error)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("stop", [3, 147, 205, 214])
def test_a_resumed_guard_continues_bit_for_bit(own: bool, stop: int) -> None:
    losses = noisy(lambda step: healthy(step) * (1 + 0.02 * max(0, step - 200)), 0)
    reference = None if own else noisy(healthy, 1)
    schedule, again = schedule_of(), schedule_of()
    guard, second = (LossGuard(each, reference, **SETTINGS) for each in (schedule, again))
    fed(guard, schedule, losses, stop)
    saved = json.loads(json.dumps([schedule.state_dict(), guard.state_dict()]))
    again.load_state_dict(saved[0])
    second.load_state_dict(saved[1])
    assert second.state_dict() == guard.state_dict()
    assert fed(second, again, losses) == fed(guard, schedule, losses) is not None
    assert second.state_dict() == guard.state_dict() and second.report() == guard.report()
    third = LossGuard(schedule, reference, **SETTINGS)  # after the end, a short phase is no error
    third.load_state_dict(guard.state_dict())
    with pytest.raises(ScheduleError, match="load the states of both"):
        late = LossGuard(fresh := schedule_of(), reference, **SETTINGS)
        late.load_state_dict(guard.state_dict())
        fresh.resume_at(stop)
        late.update(1.0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_losses_that_are_not_finite_are_left_out_and_trip_only_where_nothing_else_comes(value: float) -> None:
    schedule = schedule_of()
    guard = LossGuard(schedule, **SETTINGS)
    assert guard.report().step is None and "no loss was compared" in str(guard.report())
    losses = {step: healthy(step) for step in range(1, STEPS + 1)}
    spoilt = losses | {103: value, 104: value} | dict.fromkeys(range(201, STEPS + 1), value)
    assert fed(guard, schedule, spoilt) == 200 + SETTINGS["interval"] * SETTINGS["patience"]
    assert guard.report().not_finite == 2 + SETTINGS["interval"] * SETTINGS["patience"]
    assert math.isfinite(guard.report().loss)


def test_dense_steps_and_repeated_calls_are_ignored_and_a_new_sparse_phase_begins_anew() -> None:
    schedule = schedule_of(Phase("dense", 30), Phase("sparse", 60), Phase("dense", 30), Phase("sparse", 60))
    guard = LossGuard(schedule, **SETTINGS)
    losses = {step: 1.0 if step <= 30 else 2.0 if step <= 90 else 1.0 if step <= 120 else 5.0 for step in range(1, 181)}
    for step in losses:  # each phase is flat: to mix two of them would trip
        schedule.resume_at(step)
        for value in (losses[step], 100.0):
            assert not guard.update(value)
    assert guard.report().loss == pytest.approx(5.0) and schedule.ended_at is None


def test_beyond_the_end_of_the_reference_nothing_is_compared_and_that_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    schedule = schedule_of()
    guard = LossGuard(schedule, {1: 3.0, 100: 3.0}, **SETTINGS)
    with caplog.at_level(logging.WARNING, "semisparse"):
        assert fed(guard, schedule, {step: 3.0 if step <= 100 else 9.0 for step in range(1, STEPS + 1)}) is None
    assert [record.getMessage() for record in caplog.records] == [
        "the reference of the loss guard ends at step 100: later losses are not compared"
    ]
    assert guard.report().step == 100


FILES = {
    "list.json": "[[1, 4.0], [101, 2.0]]",
    "object.json": '{"101": 2.0, "1": 4}',
    "headed.csv": "step,loss\n1,4.0\n101,2.0\n",
    "plain.csv": "\ufeff1, 4.0\n\n101, 2.0",
}


@pytest.mark.parametrize("name", FILES)
def test_a_reference_is_read_from_a_file_and_interpolated(name: str, tmp_path) -> None:
    (tmp_path / name).write_text(FILES[name], encoding="utf-8")
    schedule = schedule_of()
    guard = LossGuard(schedule, tmp_path / name, smoothing=1, interval=1, patience=1)
    fed(guard, schedule, {step: 4 - 2 * (step - 1) / 100 for step in range(1, STEPS + 1)}, 26)
    assert guard.report().reference == pytest.approx(3.5)


DAMAGED = {
    "half.json": ("[[1, 4.0], [2", "holds no curve"),
    "number.json": ("3", "holds a int"),
    "twice.json": ('{"1": 2.0, "1": 3.0}', "step 1 is there twice"),
    "nan.json": ("[[1, 2.0], [2, NaN]]", "loss of step 2 is nan, not a finite"),
    "huge.json": ("[[1, 2.0], [2, 1" + 400 * "0" + "]]", "holds no curve"),
    "text.json": ('[[1, 2.0], [2, "3"]]', "loss of step 2 is '3'"),
    "fraction.json": ("[[1.5, 2.0], [2, 3]]", "step 1.5 is not a whole"),
    "triple.json": ("[[1, 2.0, 3], [2, 3]]", "holds no curve"),
    "deep.json": (10_000 * "[", "holds no curve"),
    "one.csv": ("step,loss\n1,2.0\n", "it has 1 points"),
    "empty.csv": ("", "it has 0 points"),
    "columns.csv": ("1,2.0\n2,3.0,4\n", "a line has 3 columns"),
    "words.csv": ("step,loss\n1,2.0\n2,low\n", "could not convert"),
    "signed.csv": ("-1,2.0\n2,3\n", "step '-1' is not a whole"),
    "curve.txt": ("1,2\n2,3", r"must end in \.json or \.csv"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_reference_is_refused(name: str, tmp_path) -> None:
    text, message = DAMAGED[name]
    (tmp_path / name).write_text(text)
    with pytest.raises(ScheduleError, match=message):
        LossGuard(schedule_of(), str(tmp_path / name))


BAD: dict[str, tuple[Callable[[SparseSchedule], object], type[Exception], str]] = {
    "missing": (lambda s: LossGuard(s, "no.csv"), ScheduleError, "cannot be read: No such file"),
    "kind": (lambda s: LossGuard(s, 3), ScheduleError, "reference is a int"),
    "mapping": (lambda s: LossGuard(s, {1: math.nan, 2: 1.0}), ScheduleError, "reference: the loss of step 1 is nan"),
    "elsewhere": (lambda s: LossGuard(s, {500: 1.0, 900: 1.0}), ScheduleError, "longest sparse phase has 0 of which"),
    "short": (lambda s: LossGuard(s, smoothing=380), ScheduleError, "needs 411 sparse steps .* phase has 400"),
    "schedule": (lambda s: LossGuard(net()), ConfigError, "schedule is a Sequential"),
    "tolerance": (lambda s: LossGuard(s, tolerance=-0.1), ConfigError, r"tolerance=-0\.1"),
    "nan": (lambda s: LossGuard(s, tolerance=math.nan), ConfigError, "tolerance=nan"),
    "smoothing": (lambda s: LossGuard(s, smoothing=0), ConfigError, "smoothing=0"),
    "patience": (lambda s: LossGuard(s, patience=True), ConfigError, "patience=True"),
    "interval": (lambda s: LossGuard(s, interval=1.5), ConfigError, r"interval=1\.5"),
    "loss": (lambda s: LossGuard(s).update(torch.ones(2)), ConfigError, r"loss is a tensor of shape \(2,\)"),
    "no loss": (lambda s: LossGuard(s).update(None), ConfigError, "loss is a NoneType"),
    "settings": (
        lambda s: LossGuard(s).load_state_dict(LossGuard(s, patience=4).state_dict()),
        ScheduleError,
        "build it with the same",
    ),
    "curve": (
        lambda s: LossGuard(s, {1: 2.0, 400: 1.0}).load_state_dict(LossGuard(s, {1: 2.0, 400: 1.5}).state_dict()),
        ScheduleError,
        "build it with the same",
    ),
    "state": (lambda s: LossGuard(s).load_state_dict([]), ScheduleError, "not that of a LossGuard"),
    "progress": (
        lambda s: (guard := LossGuard(s)).load_state_dict(guard.state_dict() | {"progress": {}}),
        ScheduleError,
        r"state\['progress'\]",
    ),
    "waiting": (
        lambda s: (guard := LossGuard(s)).load_state_dict(guard.state_dict() | {"waiting": [1]}),
        ScheduleError,
        r"state\['waiting'\]",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_refused_with_the_way_out(case: str) -> None:
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call(schedule_of())


@pytest.mark.parametrize(
    "damage", [{"above": -1}, {"best": "low"}, {"compared": [1, 2.0]}, {"loss": 3}, {"since": 1.5}]
)
def test_a_damaged_state_is_refused_and_changes_nothing(damage: dict) -> None:
    schedule = schedule_of()
    guard = LossGuard(schedule, **SETTINGS)
    fed(guard, schedule, noisy(healthy, 0), 33)
    state = guard.state_dict()
    with pytest.raises(ScheduleError, match="is not that of a LossGuard"):
        guard.load_state_dict(state | {"progress": state["progress"] | damage})
    assert guard.state_dict() == state
