"""Plans against measured steps, at toy size on the CPU."""

import json
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks import benchmark_semi_structured_training as program
from benchmarks import decisions, models, planned, planned_models, prepare, table
from semisparse import Plan
from semisparse.planning.timing import Times
from tests.benchmarks.test_compare import build, training

GAINING = {"dense": 1.0, "2:4 + mvue": 0.5}


def in_10_ms(step: Callable[[], object]) -> float:
    """A step's seconds, whatever the machine does: a plan predicts nothing for one that its layers' savings exceed."""
    step()
    return 0.01


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planned, "forget_compiled", lambda: None)  # settings of the process, which others share
    monkeypatch.setattr(models.Card, "compile", lambda self, model: model)
    monkeypatch.setitem(planned_models.PLANNED, "one", models.Card("one", "details", build, training, None))
    monkeypatch.setattr(planned, "seconds", in_10_ms)
    monkeypatch.setattr(planned, "_toy_times", lambda problem, calls, mode: {
        name: Times(GAINING[name]) for name in calls if name in GAINING
    })  # fmt: skip


def test_a_plan_is_made_applied_and_judged_beside_dense_and_everything_swapped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program.main(["--plan", "--card", "one", "--toy", "--rounds", "2", "--save", str(tmp_path)])
    result = json.loads((tmp_path / "plan-one.json").read_text())
    assert list(result["times_ms"]) == ["dense", "planned", "all 2:4", "all fp8 + 2:4"]
    assert result["error"] == result["predicted_ms"] / result["times_ms"]["planned"]["median_ms"] - 1
    assert [row["choice"] for row in result["plan"]["rows"]] == ["2:4 + mvue"] * 2
    (tmp_path / "plan.json").write_text(json.dumps(result["plan"]))
    assert str(Plan.load(tmp_path / "plan.json")) == result["printed"]
    (row,) = decisions.decided([result]).rows
    assert row[0] == "one" and row[-1] == "2 2:4+mvue"
    assert max(map(len, capsys.readouterr().out.splitlines())) <= table.WIDTH


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "eager"])
@pytest.mark.parametrize("gaining", ["2:4 + mvue", "dense fp8", "nothing"])
@pytest.mark.parametrize("first", [True, False], ids=["in a fresh process", "after 2:4"])
def test_only_sparse_variants_are_compared_with_dense_of_the_fresh_process(
    compiled: bool, gaining: str, first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = {"dense": 0.5}
    monkeypatch.setattr(planned, "ran_sparse", lambda: not first)
    monkeypatch.setattr(planned, "fresh_ms", lambda calls: fresh if first else {})
    monkeypatch.setattr(planned, "_toy_times", lambda problem, calls, mode: {
        name: Times(1.0 if name == "dense" else 0.5) for name in calls if name in ("dense", gaining)
    })  # fmt: skip
    card = models.Card("one", "details", build, training, None, compiled=compiled)
    monkeypatch.setitem(planned_models.PLANNED, "one", card)
    found = planned.benchmark("one", 3, True)
    dense = found["times_ms"]["dense"]
    if compiled and first:
        fresh = {"dense": found["plan"]["step"]["ms"]}  # what the plan timed before it ran anything else
    assert found["fresh_ms"] == (fresh if first else {})
    sparse = {"all 2:4", "all fp8 + 2:4", *(["planned"] if gaining == "2:4 + mvue" else [])}
    for variant, timing in found["times_ms"].items():
        known = first and variant in sparse
        base = [fresh["dense"]] * len(dense["blocks_ms"]) if known else dense["blocks_ms"]
        wanted = statistics.median(one / two for one, two in zip(base, timing["blocks_ms"], strict=True))
        assert found["ratio_to_dense"][variant] == pytest.approx(wanted), variant


def test_the_inputs_are_those_of_the_step_and_nothing_is_trained() -> None:
    card, model = planned_models.PLANNED["one"], build(True)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    inputs, keywords = planned._inputs(card, model, True)
    assert torch.equal(inputs[0], torch.ones(8, 32, dtype=torch.bfloat16)) and not keywords
    assert all(torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True))
    assert not model._forward_pre_hooks


def test_six_compiled_and_ten_eager_models_are_judged() -> None:
    judged = [card for name, card in planned_models.PLANNED.items() if name != "one"]
    assert sorted(card.compiled for card in judged) == [False] * 10 + [True] * 6
    assert all(card.label.endswith(", eager") for card in judged if not card.compiled)
    assert len({card.label for card in judged}) == 16


def test_a_card_of_other_benchmarks_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        program.main(["--plan", "--card", "sam-vit-l", "--toy"])
    with pytest.raises(SystemExit):
        program.main(["--card", "gpt2", "--toy"])
    assert "--card sam-vit-l is not one of timm-vit-l, llama" in capsys.readouterr().err


def test_layers_of_plans_are_compiled_before_and_models_that_are_compiled_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    work = prepare.tasks("plan", ["gpt2", "llama", "gpt2-eager"], ())
    shares = [f"parts {share}" for share in range(prepare.SHARES)]
    assert [task.variant for task in work if task.card == "gpt2"] == shares
    assert [task.variant for task in work if task.card == "llama"] == [*shares, "dense", "2:4", "fp8 + 2:4"]
    assert not [task for task in work if task.card == "gpt2-eager"]
    compiled: list[slice] = []
    monkeypatch.setattr(planned, "compile_parts", lambda card, toy, share: compiled.append(share))
    for task in work[: prepare.SHARES]:
        prepare.compile_one(task, True)
    problems = list(range(11))
    assert sorted(one for share in compiled for one in problems[share]) == problems
