"""Tuning all products of a model at once, on the simulated library."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from semisparse import SparseConfig, _tune, sparsify, tuning
from semisparse.errors import ConfigError, NoLayerMatchedError
from semisparse.gemm.autotune import tiles
from semisparse.gemm.autotune.autotuner import Autotuner
from semisparse.gemm.autotune.store import Store
from semisparse.gemm.problem import Problem
from semisparse.planning import wanted
from semisparse.planning.collect import NEVER_CALLED
from tests.gemm.simulated import make_engine
from tests.gemm.tuning import Timed, call
from tests.surgery.models import Snapshot

BF16 = torch.bfloat16


class Model(nn.Module):
    """Two layers alike, one of other sizes that is called with two numbers of tokens, one without a call."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(32, 32, dtype=BF16), nn.Linear(32, 32, dtype=BF16)
        self.c, self.unused = nn.Linear(32, 48, bias=False, dtype=BF16), nn.Linear(32, 32, dtype=BF16)
        self.noise = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.noise(self.b(self.a(x)))
        return torch.cat([self.c(y), self.c(y[:8])])


def sparse_model(config: SparseConfig | None = None) -> Model:
    model = Model()
    sparsify(model, config or SparseConfig(grad_output="mvue"), select=lambda name, layer: True)
    return model


X = torch.ones(64, 32, dtype=BF16)


@pytest.fixture
def simulate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Autotuner]:
    """Puts an autotuner on the simulated library in the place of the process's, as in a process of its own."""

    monkeypatch.setattr(tiles, "TILE", dict.fromkeys(tiles.TILE, 1))  # so that small products are tuned

    def put(**options: Any) -> Autotuner:
        engine = make_engine()[0]

        def measure(problem: Problem, device: torch.device) -> None:
            with torch.random.fork_rng():  # the test's operands are drawn from the global generator
                call(tuner, problem)

        tuner = Autotuner(engine, Store(tmp_path / "choices"), make_candidates=Timed, **({"shipped": tuple} | options))
        for module in (_tune, wanted, tuning):
            monkeypatch.setattr(module, "autotuner", lambda: tuner)
        monkeypatch.setattr(wanted, "engine", lambda: engine)
        monkeypatch.setattr(wanted, "why_no_engine", lambda *facts: "")
        monkeypatch.setattr(_tune, "measure", measure)
        return tuner

    return put


def outcomes(report: tuning.TuningReport) -> dict[str, int]:
    names = [row.outcome for row in report]
    return {name: names.count(name) for name in dict.fromkeys(names)}


def test_each_distinct_problem_is_tuned_once_and_a_second_process_finds_all(simulate: Callable[..., Any]) -> None:
    tuner, lines = simulate(), []
    report = tuning.tune(sparse_model(), X, progress=lines.append)
    assert outcomes(report) == {"tuned": len(report)} == {"tuned": len(tuner.choices())} == {"tuned": len(lines)}
    assert [row.choice.algorithm for row in report if row.choice] == [4] * len(report)
    forward = next(row for row in report if "a forward" in row.products)
    assert forward.products == ("a forward", "b forward")
    everything = {product for row in report for product in row.products}
    assert {"b grad_input", "c grad_weight", "a grad_weight"} <= everything
    assert "a grad_input" not in everything  # the model's input needs none
    assert report.layers == {"unused": NEVER_CALLED}
    assert report.complete
    simulate()
    assert outcomes(tuning.tune(sparse_model(), X)) == {"cached": len(report)}


def test_a_step_after_tuning_measures_nothing(simulate: Callable[..., Any]) -> None:
    tuner = simulate()
    found, _ = wanted.wanted_by(sparse_model(), (X,), {})
    tuning.tune(sparse_model(), X)
    assert all(tuner.known(one.problem, -1) for one in found.values())


def test_the_shipped_table_is_used(simulate: Callable[..., Any]) -> None:
    first = simulate()
    tuning.tune(sparse_model(), X)
    first._store._folder.rename(first._store._folder.parent / "away")
    simulate(shipped=lambda: [(key, replace(choice, source="shipped")) for key, choice in first.choices()[:2]])
    found = tuning.tune(sparse_model(), X)
    assert outcomes(found) == {"shipped": 2, "tuned": len(found) - 2}


def test_the_budget_leaves_out_what_is_not_reached_and_says_so(
    simulate: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tuner, ticks = simulate(), iter(range(1000))
    report = _tune.tuned(sparse_model(), (X,), {}, 2.5, print, wanted_alone(), lambda: float(next(ticks)))
    assert outcomes(report) == {"tuned": 2, "left out": len(report) - 2}
    assert len(tuner.choices()) == 2
    assert set(report.left_out.values()) == {"the budget of 2.5 s was spent"}
    assert not report.complete
    works = [row.problem for row in report][:2]
    assert works == [row.problem for row in report if row.outcome == "tuned"]  # those with most work come first
    assert all(len(line) <= 80 for line in str(report).splitlines())
    assert "the budget of 2.5 s was spent" in " ".join(str(report).split())


def wanted_alone() -> Any:
    return tuning.Ranks(None, lambda: 0, active=False)


def test_lack_of_memory_and_switched_off_tuning_are_said(
    simulate: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    simulate()

    def full(problem: Problem, device: torch.device) -> None:
        raise torch.OutOfMemoryError("no room")

    with monkeypatch.context() as patched:
        patched.setattr(_tune, "measure", full)
        assert set(tuning.tune(sparse_model(), X).left_out.values()) == {"out of memory"}
        patched.setenv("SEMISPARSE_TUNE", "0")
        (why,) = set(tuning.tune(sparse_model(), X).left_out.values())
        assert "SEMISPARSE_TUNE=0" in why


def test_the_model_stays_as_it_is_and_is_not_tuned_while_it_is_looked_at(simulate: Callable[..., Any]) -> None:
    tuner, model = simulate(), sparse_model()
    pauses: list[bool] = []
    model.noise.register_forward_hook(lambda *call: pauses.append(tuner.off))
    model.a.weight.grad = torch.ones_like(model.a.weight)
    before = Snapshot(model)
    state = torch.get_rng_state()
    tuning.tune(model, X)
    assert pauses == [True]
    assert not tuner.off
    before.assert_unchanged()
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.a._forward_pre_hooks


def test_the_error_of_the_model_comes_through(simulate: Callable[..., Any]) -> None:
    tuner, model = simulate(), sparse_model()
    with pytest.raises(TypeError, match="unexpected keyword"):
        tuning.tune(model, X, unknown=1)
    assert not model.a._forward_pre_hooks
    assert not tuner.off


def test_without_a_sparse_product_the_result_is_empty_and_says_so() -> None:
    report = tuning.tune(sparse_model(), X)
    assert (len(report), report.complete) == (0, False)
    assert "the weight is on cpu" in report.layers["a"]
    assert report.layers["unused"] == NEVER_CALLED
    assert "nothing was tuned" in str(report)


def test_what_cannot_be_tuned_is_refused() -> None:
    with pytest.raises(NoLayerMatchedError, match="call sparsify first"):
        tuning.tune(Model(), X)
    with pytest.raises(ConfigError, match="seconds=0"):
        tuning.tune(sparse_model(), X, seconds=0)
    with pytest.raises(ConfigError, match="progress=True must be a callable"):
        tuning.tune(sparse_model(), X, progress=True)  # type: ignore[arg-type]
