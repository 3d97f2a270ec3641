"""The parts of a self-check: layers and a model at toy size, and what happens where one raises or time runs out."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from semisparse.errors import ConfigError
from semisparse.gemm.autotune.algorithm import Choice
from semisparse.planning.candidates import default_candidates
from semisparse.planning.problems import LinearProblem
from semisparse.selfcheck import layers, layouts, model, numerics, running
from semisparse.selfcheck.contents import Check, Report
from semisparse.selfcheck.operands import Setting
from tests.planning.simulated import CPU, SHARES, SimulatedTimer, dense_ms, measurer

TOY = ((16, 32, 64), (32, 64, 32))


def test_layers_are_timed_as_a_plan_does_and_kept_as_they_come() -> None:
    found: list[Any] = []
    left = iter([10.0, -1.0])
    layers.time_layers(
        measurer(SimulatedTimer(), clock=iter(range(1000)).__next__), lambda: next(left), found.append, TOY
    )
    first, second = found
    assert first.problem == LinearProblem(*TOY[0])
    ms = {name: times.ms for name, times in first.measurement.times.items()}
    assert ms == {name: dense_ms(first.problem) * share for name, share in SHARES.items()}
    assert second.measurement.times == {} and "budget of 0.0 s was spent" in second.measurement.dropped["dense"]


def test_the_choices_are_those_of_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    choice = Choice(1, 1, 1.0, 2.0, "tuned")
    entries = [
        ({"rows": 64, "reduction": 32, "columns": 16}, choice),
        ({"rows": 64, "reduction": 64, "columns": 16}, choice),
    ]
    entries.insert(1, ({"out_features": 64, "in_features": 32, "tokens": 16}, choice))
    monkeypatch.setattr(layers, "autotuner", lambda: SimpleNamespace(used=lambda: entries))
    assert layers.choices_of([LinearProblem(*TOY[0])]) == entries[:2]


def toy_model(**how: Any) -> Any:
    settings: dict[str, Any] = {"sizes": (32, 64, 2, 16), "timer": lambda calls: dict.fromkeys(calls, 2.0)} | how
    left = settings.pop("left", lambda: 100.0)
    return model.time_model(CPU, default_candidates(), left, lambda line: None, **settings)


def test_the_model_runs_with_each_candidate_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "compile_static", lambda function: function)
    found = toy_model()
    assert found.mode == "compiled" and list(found.ms) == ["dense", *model.ORDER] and not found.dropped
    assert set(model.ORDER) == default_candidates().keys()


def test_where_nothing_compiles_it_runs_eager_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(function: Any) -> Any:
        raise RuntimeError("no compiler\nat all")

    monkeypatch.setattr(model, "compile_static", failing)
    found = toy_model()
    assert (found.mode, found.why_eager) == ("eager", "RuntimeError: no compiler") and len(found.ms) == 6


def test_variants_that_fail_or_come_too_late_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "compile_static", lambda function: function)
    original = model.sparsify

    def sparsify(stack: Any, config: Any) -> Any:
        if config.precision is None:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(stack, config)

    monkeypatch.setattr(model, "sparsify", sparsify)
    left = iter([100.0, 100.0, 5.0, 5.0, 5.0])
    found = toy_model(left=lambda: next(left))
    assert list(found.ms) == ["dense", "fp8 + 2:4"]
    assert found.dropped["2:4"] == "OutOfMemoryError: CUDA out of memory"
    assert found.dropped["dense fp8"] == "not timed: the budget was spent"


@pytest.fixture
def no_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numerics, "paths", dict)


def test_without_a_gpu_it_checks_what_the_cpu_can_and_times_nothing(no_paths: None) -> None:
    kept: list[int] = []
    report = running.selfcheck(keep=lambda found: kept.append(len(found.parts)))
    assert [(part.name, part.outcome) for part in report.parts] == [
        ("numerics", "done"), ("layouts", "skipped"), ("layers", "skipped"), ("model", "skipped"),
    ]  # fmt: skip
    assert report.gpu is None and report.device == "cpu" and kept == [0, 1, 2, 3, 4]
    assert report.parts[-1].reason == "there is no CUDA GPU, so nothing was timed"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, no_paths: None) -> None:
    """A GPU on which every part but the first one fails."""

    def raising(*args: Any, **how: Any) -> None:
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for place, name in ((running, "environment"), (running, "gpu")):
        monkeypatch.setattr(place, name, {"environment": FOUND, "gpu": lambda device: None}[name])
    monkeypatch.setattr(numerics, "setting_of", lambda device: Setting(CPU, (4, 4, 4)))
    monkeypatch.setattr(layouts, "find_layouts", raising)
    monkeypatch.setattr(running, "_layers", raising)
    monkeypatch.setattr(model, "time_model", raising)


def FOUND() -> Any:
    from semisparse.environment import Environment

    return Environment("cuda", {}, ())


def test_a_part_that_raises_is_recorded_and_the_rest_goes_on(gpu: None) -> None:
    report = running.selfcheck()
    assert [part.outcome for part in report.parts] == ["done", "raised", "raised", "raised"]
    assert {part.reason for part in report.parts[1:]} == {"RuntimeError: no kernel image"}
    assert not report.failed


def test_quick_times_nothing(gpu: None) -> None:
    report = running.selfcheck(quick=True)
    assert [part.outcome for part in report.parts] == ["done", "raised", "skipped", "skipped"]


def test_a_report_fails_where_a_path_is_wrong_or_none_could_be_checked(
    gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(numerics, "check_paths", lambda setting, late, progress, add: add(Check("a", "raised")))
    assert running.selfcheck(quick=True).failed
    monkeypatch.setattr(numerics, "check_paths", lambda *args: [][0])
    assert running.selfcheck(quick=True).failed


def test_a_part_ends_with_its_share_of_the_budget_and_leaves_the_rest_to_the_next() -> None:
    now = [0.0]
    report = Report("", False, 200.0, "cuda", {}, [])
    made = running.Running(report, CPU, lambda line: None, lambda found: None, lambda: now[0])
    seen: list[float] = []
    for name, seconds in (("numerics", 10.0), ("layouts", 0.0), ("layers", 500.0), ("model", 0.0)):

        def work(seconds: float = seconds) -> None:
            seen.append(made.left())
            now[0] += seconds

        made.part(name, work)
    assert seen == [60.0, 60.0, 140.0, -310.0]
    assert made.late() and [part.seconds for part in report.parts] == [10.0, 0.0, 500.0, 0.0]


@pytest.mark.parametrize("budget", [0, -1.0, float("nan"), float("inf"), "long", True])
def test_a_budget_must_be_seconds(budget: Any) -> None:
    with pytest.raises(ConfigError, match="budget="):
        running.selfcheck(budget=budget)
