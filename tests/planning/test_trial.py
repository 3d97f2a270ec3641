"""Trying choices in the whole step: a simulated clock tells what a step takes with the layers that are swapped."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import nn

from semisparse import SparseConfig
from semisparse._plan import planned, uses_of
from semisparse.errors import PlanError
from semisparse.nn.base import SemiSparseBase
from semisparse.planning import timing, trial
from semisparse.planning.timing import Times
from semisparse.planning.trial import Configs, Tried, tried
from tests.planning.simulated import SimulatedTimer, measurer

PLAIN, SAMPLED = SparseConfig(), SparseConfig(grad_output="mvue")


class Net:
    """A model, its step, and a clock: every step takes 10 ms, and `each` more per swapped layer that it calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, each: float) -> None:
        self.model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.each, self.now, self.seen = each, 0.0, set[tuple[str, ...]]()
        monkeypatch.setattr(timing, "_run", self._run)

    def step(self) -> None:
        self.model(torch.ones(8, 32)).sum().backward()
        self.optimizer.step()
        swapped = self.swapped()
        self.seen.add(tuple(str(layer.sparse_config.grad_output) for layer in swapped))
        self.now += 10 + self.each * len(swapped)

    def swapped(self) -> list[SemiSparseBase]:
        return [layer for layer in self.model if isinstance(layer, SemiSparseBase)]

    def _run(self, call: Callable[[], object], count: int) -> float:
        before = self.now
        call()  # as often as asked for would be slow
        return (self.now - before) * count


def test_each_variant_is_timed_in_the_step_and_the_model_is_dense_again(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net(monkeypatch, each=2.0)
    before = net.model[0].weight.clone()
    base, found = tried(net.model, net.step, [{"0": PLAIN}, {"0": PLAIN, "1": SAMPLED}])
    assert base == 10.0 and [one.ms for one in found] == pytest.approx([12.0, 14.0])
    assert all(len(one.ratio) == timing.STEP_ROUNDS and not one.pays for one in found)
    assert net.seen == {(), ("None",), ("None", "mvue")}
    assert [type(layer) for layer in net.model] == [nn.Linear, nn.Linear]
    assert not torch.equal(net.model[0].weight, before), "the steps train"


def test_a_step_that_does_not_run_the_model_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    net, other = Net(monkeypatch, each=2.0), Net(monkeypatch, each=2.0)
    with pytest.raises(PlanError, match="does not run the layers of model"):
        tried(other.model, net.step, [{"0": PLAIN}])
    assert not other.swapped()


def test_an_error_of_the_step_comes_through_and_the_model_is_dense_again(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net(monkeypatch, each=2.0)

    def step() -> None:
        if net.swapped():
            raise ValueError("of the step")
        net.step()

    with pytest.raises(ValueError, match="of the step"):
        tried(net.model, step, [{"0": PLAIN}])
    assert not net.swapped()


STEP = Times(100.0, None, 60.0)


def choices(attempt: trial.Trial | None, step: Times = STEP) -> tuple[Sequence[str], object]:
    """A plan of two layers whose candidate saves 0.5 ms each on the device and costs the host 1 ms."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).to(torch.bfloat16)
    timer = SimulatedTimer({"dense": 1.0, "2:4": 0.5}, {"dense": 1.0, "2:4": 2.0})
    x = torch.ones(64, 64, dtype=torch.bfloat16)
    plan = planned(uses_of(model, (x,), {}, None), measurer(timer, ["2:4"]), step, attempt)
    return [row.choice for row in plan], plan


def test_a_choice_pays_if_it_is_faster_by_the_margin_and_in_most_rounds() -> None:
    assert Tried(90.0, (0.9,) * 16).pays and not Tried(99.5, (0.995,) * 16).pays
    assert Tried(90.0, (0.9,) * 12 + (1.3,) * 4).pays and not Tried(90.0, (0.9,) * 11 + (1.3,) * 5).pays


def test_a_drift_of_the_machine_between_rounds_cancels(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net(monkeypatch, each=-1.0)
    slower = iter([1.0] * 4 + [2.0] * 40)

    def block(call: Callable[[], object], count: int) -> float:
        if not net.swapped():
            net.factor = next(slower)
        before = net.now
        call()
        return (net.now - before) * net.factor

    monkeypatch.setattr(trial, "block_ms", block)
    base, (found,) = tried(net.model, net.step, [{"0": PLAIN}])
    assert base == 20.0 and found.ratio == pytest.approx((0.9,) * timing.STEP_ROUNDS)
    assert found.ms == pytest.approx(18.0) and found.pays


@pytest.mark.parametrize(
    ("ms", "chosen", "predicted"), [(80.0, "2:4", 80.0), (99.5, "dense", 100.0), (130.0, "dense", 100.0)]
)
def test_what_the_trial_measured_decides(ms: float, chosen: str, predicted: float) -> None:
    asked: list[Configs] = []

    def attempt(variants: Sequence[Configs]) -> tuple[float, list[Tried]]:
        asked.extend(variants)
        return 100.0, [Tried(ms, (ms / 100,) * 16)] * len(variants)

    found, plan = choices(attempt)
    assert asked and all(asked) and set(found) == {chosen}
    assert plan.predicted_ms == pytest.approx(predicted) and plan.by_layers_ms is not None
    assert "Tried in the whole step: 100.00 ms dense" in str(plan) and f"{ms:.2f} ms with 2 layers" in str(plan)
    if chosen == "dense":
        assert "but the whole step was not faster" in str(plan)


def test_a_trial_that_fails_is_said_and_the_layers_times_decide() -> None:
    def attempt(variants: Sequence[Configs]) -> tuple[float, list[Tried]]:
        raise PlanError("step is of another model")

    found, plan = choices(attempt)
    assert set(found) == {"2:4"} and plan.predicted_ms == plan.by_layers_ms
    assert "No choice could be tried in the whole step: PlanError: step is of another model" in " ".join(
        str(plan).split()
    )


@pytest.mark.parametrize(("host", "asked"), [(100.0, 1), (109.0, 0)])
def test_what_the_host_model_deems_a_little_slower_is_tried_too(host: float, asked: int) -> None:
    """Host times are inexact; far slower choices are not tried."""
    variants: list[Configs] = []

    def attempt(given: Sequence[Configs]) -> tuple[float, list[Tried]]:
        variants.extend(given)
        return 100.0, [Tried(95.0, (0.95,) * 16)] * len(given)

    found, _ = choices(attempt, Times(100.0, None, host))
    assert len(variants) == asked and set(found) == {"2:4" if asked else "dense"}


@pytest.mark.parametrize(("ms", "chosen"), [(6400.0, "dense"), (640.0, "2:4")])
def test_without_a_trial_a_plan_must_gain_more_of_the_step_than_predictions_are_exact_to(
    ms: float, chosen: str
) -> None:
    """Two layers save 64 ms together."""
    found, plan = choices(None, Times(ms))
    assert set(found) == {chosen} and plan.predicted_ms == (ms if chosen == "dense" else ms - 64)
    if chosen == "dense":
        assert "the whole step would gain 1.0%, which is within 2%" in " ".join(str(plan).split())
