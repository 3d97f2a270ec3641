"""The benchmarks run from start to end at toy size on the CPU, and what they print and write fits."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import benchmark_semi_structured_training as program
from benchmarks import end_to_end, jobs, linear, models, store, table, tables
from semisparse.gemm.cusparselt import Availability

WEIGHT = linear.WEIGHT


def build(toy: bool) -> nn.Module:
    return nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 32)).to(torch.bfloat16)


def step(compiled: nn.Module, model: nn.Module, toy: bool) -> Callable[[], object]:
    return lambda: compiled(torch.ones(8, 32, dtype=torch.bfloat16)).sum().backward()


def toy(label: str, **changes: bool) -> models.Card:
    return models.Card(label, "details", build, step, None, tokens=8, **changes)


@pytest.mark.parametrize("option", [["--linear"], ["--no-gain", "--mkn", "32,64,64"], ["--pack"]], ids=" ".join)
def test_a_toy_run_prints_narrow_tables_and_writes_its_result(
    option: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program.main([*option, "--toy", "--rounds", "2", "--save", str(tmp_path)])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= table.WIDTH
    (written,) = tmp_path.glob("*.json")
    result = json.loads(written.read_text())
    assert result["toy"] and result["provenance"]["commit"]
    assert written.with_suffix(".csv").exists()


def test_toy_results_cannot_be_taken_for_measurements(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        program.main(["--linear", "--toy", "--save"])
    assert "measures nothing" in capsys.readouterr().err


def test_a_ratio_is_taken_round_by_round_and_has_its_spread() -> None:
    result = next(jobs.no_gain([], [(32, 64, 64)], 3, True)).measure()
    dense, sparse = (result["times_ms"][name]["blocks_ms"] for name in ("dense", WEIGHT))
    quotients = sorted(one / two for one, two in zip(dense, sparse, strict=True))
    assert result["ratio_to_dense"][WEIGHT] == quotients[1]
    assert quotients[0] <= result["ratio_spread"][WEIGHT]["p20"] <= quotients[1]


def test_a_compiled_step_has_a_measured_limit_and_an_eager_one_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models.Card, "compile", lambda self, model: model)
    monkeypatch.setitem(models.CARDS, "one", toy("one"))
    monkeypatch.setitem(models.CARDS, "two", toy("two", compiled=False))
    one, two = (end_to_end.benchmark(name, 2, True) for name in ("one", "two"))
    assert one["limit"] > 0 and two["limit"] is None
    rows = tables.end_to_end([one, two]).rows
    assert [row[0] for row in rows] == ["one", "two"]
    assert tables.limit(one) == f"{one['limit']:.3f}" and tables.limit(two) == ""


def test_a_limit_that_cannot_be_measured_is_a_note_below_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(model: nn.Module) -> None:
        raise RuntimeError("no packing today")

    monkeypatch.setattr(models.Card, "compile", lambda self, model: model)
    monkeypatch.setitem(models.CARDS, "one", toy("one"))
    monkeypatch.setattr("benchmarks.end_to_end.semisparse.reuse_packed", refuse)
    result = end_to_end.benchmark("one", 2, True)
    assert tables.end_to_end([result]).notes == ("one, packed beforehand: RuntimeError: no packing today",)


def test_limits_of_old_results_are_marked_as_estimates() -> None:
    assert tables.limit({"limit": 1.25}) == "~1.250"
    new = {"limit_method": "measured", "limit": {WEIGHT: 1.5}, "limit_estimated": {"other": 1.25}}
    assert [tables.limit(new, name) for name in (WEIGHT, "other", "neither")] == ["1.500", "~1.250", ""]


def test_an_error_is_a_wrapped_note_and_not_a_wide_label() -> None:
    wide = table.Table(("name", "ms"), (("**dense**", "1.0"),), ("torchao does not run: " + "word " * 60,))
    lines = wide.text().splitlines()
    assert lines[:2] == ["name    ms", "dense  1.0"]
    assert len(lines) > 4 and max(map(len, lines)) <= table.WIDTH


def test_without_a_sparse_engine_nothing_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(program, "available", lambda: Availability(False, "nvmath-python cannot be imported"))
    with pytest.raises(SystemExit):
        program.main(["--no-gain"])
    assert "no sparse engine, so nothing sparse would be measured: nvmath-python" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted(store.RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_every_stored_result_was_measured_with_the_sparse_engine(path: Path) -> None:
    found = json.loads(path.read_text())["provenance"]["environment"]["capabilities"]
    (product,) = (one["path"] for one in found if one["name"] == "sparse GEMM")
    assert product.startswith("cuSPARSELt")
