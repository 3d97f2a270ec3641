"""The file of a run, the record, and the page that shows it."""

import json
from pathlib import Path

import pytest

from tests import reliability
from tests.trust import __main__ as program
from tests.trust import report
from tests.trust.outcome import MOST_FAULTS, MOST_RAISED, NotHere, Part, Record, Row

PROVENANCE = {
    "commit": "0123456789abcdef", "time": "2026-01-02T03:04:05Z", "gpu": "NVIDIA H100 80GB HBM3", "peaks_tflops": {},
    "environment": {"facts": dict.fromkeys(("torch", "triton", "cuSPARSELt", "nvmath-python"), "1")},
}  # fmt: skip


@pytest.mark.parametrize(
    ("figure", "limit", "rule", "passed"),
    [(0, 0, "at most", True), (1, 0, "at most", False), (3, 3, "at least", True), (2, 3, "at least", False),
     (5, None, "reported", True), (float("nan"), 1, "at most", False), (float("inf"), 1, "at least", False),
     (None, 1, "at most", False)],
)  # fmt: skip
def test_a_figure_keeps_to_its_limit_or_not(figure, limit, rule, passed) -> None:
    assert Row("B1", "x", "y", figure, limit, rule).document()["passed"] is passed


@pytest.mark.parametrize(
    ("value", "shown"), [(0.0, "0"), (262144, "262,144"), (0.98765, "0.988"), (2.0, "2"), (None, "not finite")]
)
def test_figures_are_short(value: float | None, shown: str) -> None:
    assert report._number(value) == shown


def test_what_a_part_raises_is_recorded_and_the_next_one_runs(tmp_path: Path) -> None:
    record = Record(tmp_path, quick=False, provenance=PROVENANCE)
    with record.part("first", 1.0) as part:
        part.add(Row("B1", "x", "y", float("nan"), faults=["fault"] * (MOST_FAULTS + 1)))
        written = json.loads(record.path.read_text())["parts"][0]
        assert written["outcome"] == "running" and written["rows"][0]["figure"] is None
        raise RuntimeError("gone")
    with record.part("second", 1.0):
        raise NotHere("no GPU")
    first, second = json.loads(record.path.read_text())["parts"]
    assert (first["outcome"], first["reason"]) == ("raised", "RuntimeError: gone")
    assert len(first["rows"][0]["faults"]) == MOST_FAULTS
    assert (second["outcome"], second["reason"]) == ("skipped", "no GPU")
    assert not record.passed and [path.name for path in tmp_path.iterdir()] == ["trust.json"]


def run_of(*parts: str, quick: bool = False) -> report.Document:
    rows = [Row("B1", "shapes", "of 330", 330, 300, "at least").document()]
    made = [{"name": name, "outcome": "done", "reason": "", "rows": rows} for name in parts]
    return {"kind": "trust", "quick": quick, "provenance": PROVENANCE, "parts": made}


def test_runs_of_single_parts_make_one_record() -> None:
    later = run_of("soak")
    later["parts"][0]["outcome"] = "raised"
    record = report.merged(report.merged(None, [run_of("soak", "numerics-2")]), [run_of("numerics"), later])
    assert [(part["name"], part["outcome"]) for part in record["parts"]] == [
        ("numerics", "done"), ("numerics-2", "done"), ("soak", "raised"),
    ]  # fmt: skip
    shown = report.table(record)
    assert "| B1 | shapes | of 330 | 330 | at least 300 | yes |" in shown
    assert "- soak: raised" in shown and "One NVIDIA H100 80GB HBM3, torch 1" in shown


@pytest.mark.parametrize("run", [run_of("soak", quick=True), {"kind": "plan"}, {}])
def test_what_is_no_whole_run_is_refused(run: report.Document) -> None:
    with pytest.raises(ValueError, match="no whole run"):
        report.merged(None, [run])


def test_the_page_shows_the_record() -> None:
    assert reliability.PAGE.read_text() == reliability.page()


def test_a_record_shows_what_holds() -> None:
    record = report.read(report.RECORD)
    for part in [] if record is None else record["parts"]:
        assert part["outcome"] != "running"
        assert part["provenance"]["gpu"] != "none"


def test_the_program_runs_the_parts_that_are_named(tmp_path: Path, monkeypatch, capsys) -> None:
    ran = []

    def budgets(folder: Path) -> dict[str, program.Budget]:
        def work(machine, part) -> None:
            ran.append((part.name, part.seconds))
            part.add(Row("B1", "x", "y", int(part.name == "soak")))

        return {name: program.Budget(9.0, 3.0, work, work) for name in ("numerics", "leaks", "soak")}

    monkeypatch.setattr(program, "budgets", budgets)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert program.main([str(tmp_path / "out"), "--parts", "leaks,numerics", "--quick", "--here"]) == 0
    assert ran == [("numerics", 3.0), ("leaks", 3.0)]
    assert program.main([str(tmp_path / "out"), "--parts", "soak", "--seconds", "5", "--here"]) == 1
    assert ran[2] == ("soak", 5.0) and "FAIL B1 x: 1" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        program.main([str(tmp_path / "out"), "--parts", "nothing"])


def test_a_gpu_without_sparse_products_passes_nothing(tmp_path: Path, monkeypatch) -> None:
    class Machine:
        cuda = True

        def __init__(self, device) -> None:
            pass

        def why_not_sparse(self) -> str:
            return "cuSPARSELt is missing"

    monkeypatch.setattr(program, "Machine", Machine)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert program.main([str(tmp_path), "--parts", "leaks", "--here"]) == 1
    (part,) = json.loads((tmp_path / "trust.json").read_text())["parts"]
    assert part["outcome"] == "raised" and "cuSPARSELt is missing" in part["reason"] and not part["rows"]


def test_a_run_that_was_killed_is_not_done() -> None:
    run = run_of("soak")
    run["parts"][0]["outcome"] = "running"
    (part,) = report.merged(None, [run])["parts"]
    assert (part["outcome"], part["reason"]) == ("raised", "the run was killed")


def test_cases_that_raise_end_a_part_where_all_do() -> None:
    part = Part("numerics", 60.0)
    for at in range(MOST_RAISED):
        assert part.left() > 0
        with part.attempt(f"case {at}"):
            raise ValueError("gone")
    with part.attempt("no time for it"):
        part.check()
    assert part.left() == 0
    (row,) = part.all_rows()
    assert (row.item, row.figure, row.size) == ("B1", MOST_RAISED, f"of {MOST_RAISED}") and not row.passed
    assert row.faults[0] == "case 0: ValueError: gone"


def test_the_parts_are_those_of_the_plan(tmp_path: Path) -> None:
    parts = program.budgets(tmp_path)
    assert list(parts) == [
        "numerics",
        "numerics-2",
        "algorithms",
        "algorithms-2",
        "algorithms-3",
        "algorithms-4",
        "determinism",
        "graphs",
        "leaks",
        "convergence",
        "sanitizer",
        "soak",
    ]
    assert program.usual(quick=False) == list(parts)
    quick = program.usual(quick=True)
    assert set(parts) - set(quick) == {"algorithms-2", "algorithms-3", "algorithms-4"}
    assert sum(parts[name].quick for name in quick) < 90
