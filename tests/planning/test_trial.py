"""Trying choices in the whole step: a simulated clock tells what a step takes with the layers that are swapped."""

import gc
import re
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import nn

from semisparse import Plan, SparseConfig, sparsify
from semisparse._plan import planned, uses_of
from semisparse.errors import PlanError
from semisparse.nn import SemiSparseLinear
from semisparse.nn.base import SemiSparseBase
from semisparse.planning import timing, trial
from semisparse.planning.timing import Times
from semisparse.planning.trial import NO_MEMORY, Configs, Tried, tried
from semisparse.schedule import optimizer_steps
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


def choices(attempt: trial.Trial | None, step: Times = STEP, host: float = 2.0) -> tuple[Sequence[str], Plan]:
    """A plan of two layers whose candidate saves 32 ms each on the device, and takes 2 ms of the host instead of 1."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).to(torch.bfloat16)
    timer = SimulatedTimer({"dense": 1.0, "2:4": 0.5}, {"dense": 1.0, "2:4": host})
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
    text = " ".join(str(plan).split())
    assert re.search(r"Tried in the whole step: 100\.00 ms dense \(\d+\.00 ms when the plan began\), ", text)
    assert f"{ms:.2f} ms with 2 layers" in text
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


@pytest.mark.parametrize(("ms", "chosen"), [(1800.0, "dense"), (6400.0, "dense"), (640.0, "2:4")])
def test_without_a_trial_a_plan_must_gain_more_of_the_step_than_predictions_are_exact_to(
    ms: float, chosen: str
) -> None:
    """Two layers save 64 ms together."""
    found, plan = choices(None, Times(ms))
    assert set(found) == {chosen} and plan.predicted_ms == (ms if chosen == "dense" else ms - 64)
    if chosen == "dense":
        assert f"the whole step would gain {64 / ms:.1%}, which is within 4%" in " ".join(str(plan).split())


def test_a_model_that_is_sparse_in_part_is_not_tried_and_stays_so(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net(monkeypatch, each=2.0)
    sparsify(net.model, {"1": SAMPLED})
    net.model[1].sparse_enabled = False  # as in a dense phase of the user's schedule
    with pytest.raises(PlanError, match="model is not dense: 1 is semi-sparse"):
        tried(net.model, net.step, [{"0": PLAIN}])
    assert [layer.sparse_config for layer in net.swapped()] == [SAMPLED] and not net.model[1].sparse_enabled


def test_ctrl_c_in_the_middle_of_a_swap_leaves_the_model_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net(monkeypatch, each=2.0)
    swap = SemiSparseLinear.from_dense

    def interrupted(linear: nn.Linear, config: SparseConfig) -> nn.Linear:
        if linear is net.model[1]:
            raise KeyboardInterrupt
        return swap(linear, config)

    monkeypatch.setattr(SemiSparseLinear, "from_dense", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tried(net.model, net.step, [{"0": PLAIN, "1": PLAIN}])
    assert not net.swapped()


def test_a_layer_that_the_step_takes_out_of_the_model_is_dense_again_and_the_steps_error_comes_through(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net = Net(monkeypatch, each=2.0)
    layer = net.model[0]

    def step() -> None:
        if net.swapped():
            net.model[0] = nn.Linear(32, 32)
            raise ValueError("of the step")
        net.step()

    with pytest.raises(ValueError, match="of the step"):
        tried(net.model, step, [{"0": PLAIN}])
    assert type(layer) is nn.Linear


def test_data_that_end_during_a_trial_end_it_as_they_would_end_training(monkeypatch: pytest.MonkeyPatch) -> None:
    net, data = Net(monkeypatch, each=2.0), iter(range(9))

    def step() -> None:
        next(data)
        net.step()

    with pytest.raises(StopIteration):
        tried(net.model, step, [{"0": PLAIN}])
    assert not net.swapped()


def test_no_schedule_of_a_variant_is_left_while_the_dense_step_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    net, before = Net(monkeypatch, each=2.0), len(optimizer_steps._listeners)
    left = set[int]()

    def step() -> None:
        if not net.swapped():
            left.add(len(optimizer_steps._listeners) - before)
        net.step()

    gc.disable()
    try:
        tried(net.model, step, [{"0": PLAIN}, {"1": SAMPLED}])
    finally:
        gc.enable()
    assert left == {0}


def test_moments_parameters_and_flags_are_those_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net(monkeypatch, each=2.0)
    net.optimizer = torch.optim.AdamW(net.model.parameters(), lr=0.1)
    net.model[1].bias.requires_grad_(False)
    net.model[0].eval()
    parameters, keys = list(net.model.parameters()), [dict(layer.__dict__) for layer in net.model]
    tried(net.model, net.step, [{"0": PLAIN, "1": SAMPLED}])
    assert all(one is other for one, other in zip(net.model.parameters(), parameters, strict=True))
    assert [layer.__dict__.keys() for layer in net.model] == [before.keys() for before in keys]
    steps = {float(state["step"]) for state in net.optimizer.state.values()}
    assert len(net.optimizer.state) == 3 and len(steps) == 1 and steps.pop() > timing.STEP_ROUNDS
    assert not net.model[1].bias.requires_grad and (net.model[0].training, net.model[1].training) == (False, True)


def test_a_variant_that_runs_out_of_memory_is_left_out_and_the_others_are_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net = Net(monkeypatch, each=-2.0)

    def step() -> None:
        if len(net.swapped()) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        net.step()

    _, found = tried(net.model, step, [{"0": PLAIN, "1": PLAIN}, {"0": PLAIN}])
    assert found[0] is NO_MEMORY and not found[0].pays
    assert found[1].ms == pytest.approx(8.0) and found[1].pays and not net.swapped()


@pytest.mark.parametrize(("ms", "chosen"), [(96.5, "dense"), (95.0, "2:4")])
def test_a_choice_must_also_beat_what_the_dense_step_took_when_the_plan_began(ms: float, chosen: str) -> None:
    """Beside sparse steps the power limit slows dense ones: 100 ms there, 97 before."""

    def attempt(variants: Sequence[Configs]) -> tuple[float, list[Tried]]:
        return 100.0, [Tried(ms, (ms / 100,) * 16)] * len(variants)

    found, plan = choices(attempt, Times(97.0, None, 1.0))
    assert set(found) == {chosen}
    assert ("not faster than when the plan began" in " ".join(str(plan).split())) == (chosen == "dense")


def test_a_choice_that_does_not_fit_into_memory_is_not_planned() -> None:
    found, plan = choices(lambda variants: (100.0, [NO_MEMORY] * len(variants)))
    text = " ".join(str(plan).split())
    assert set(found) == {"dense"} and plan.predicted_ms == 100.0
    assert "when the plan began), out of memory with 2 layers swapped" in text
    assert "2:4 takes 0.50 of dense's time on the GPU, but the whole step ran out of memory" in text

    def attempt(variants: Sequence[Configs]) -> tuple[float, list[Tried]]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    found, plan = choices(attempt)
    assert set(found) == {"dense"} and "OutOfMemoryError: CUDA out of memory" in " ".join(str(plan).split())


def test_a_failed_trial_leaves_dense_what_gains_too_little_as_without_a_trial() -> None:
    def attempt(variants: Sequence[Configs]) -> tuple[float, list[Tried]]:
        raise PlanError("step is of another model")

    found, plan = choices(attempt, Times(6400.0, None, 60.0))
    assert set(found) == {"dense"} and plan.predicted_ms == 6400.0
    assert "within 4%" in " ".join(str(plan).split()) and "step is of another model" in " ".join(str(plan).split())


def test_without_a_trial_a_plan_that_gains_nothing_of_a_step_that_the_host_bounds_stays_dense() -> None:
    found, plan = choices(None, Times(1000.0, None, 1000.0), host=1.0)
    assert set(found) == {"dense"} and "the whole step would gain 0.0%" in " ".join(str(plan).split())


@pytest.mark.parametrize("ms", [0.1385, 64.0])
def test_a_step_shorter_than_what_its_layers_save_is_said_and_predicts_nothing(ms: float) -> None:
    """Seconds instead of milliseconds, or a callable that runs something else."""
    found, plan = choices(None, Times(ms))
    assert set(found) == {"2:4"} and plan.step is plan.predicted_ms is None
    assert f"A step of {ms:g} ms cannot be this model's, as its layers would save 64 ms." in " ".join(str(plan).split())


@pytest.mark.parametrize("whole", [True, False], ids=["the model", "a layer"])
def test_a_step_in_compiled_code_is_not_tried(monkeypatch: pytest.MonkeyPatch, whole: bool) -> None:
    """Each swap would compile anew, until torch.compile gives up and leaves the user's dense step eager, too."""
    net = Net(monkeypatch, each=-2.0)
    if whole:
        compiled = torch.compile(net.model, backend="eager")
    else:
        net.model[0].compile(backend="eager")
        compiled = net.model

    def step() -> None:
        compiled(torch.ones(8, 32)).sum().backward()

    with pytest.raises(PlanError, match="compiled code, which each swap would compile anew: plan with mode='compiled'"):
        tried(net.model, step, [{"0": PLAIN}])
    assert not net.swapped() and not any(layer._forward_pre_hooks for layer in net.model)


def test_a_step_without_an_optimizer_causes_no_warning_about_a_schedule(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    net = Net(monkeypatch, each=-1.0)
    monkeypatch.setattr(timing, "_run", lambda call, count: [call() for _ in range(count)] and 5.0 * count)
    tried(net.model, lambda: net.model(torch.ones(8, 32)).sum().backward(), [{"0": PLAIN}])
    assert not recwarn.list
