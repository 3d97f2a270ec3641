"""`semisparse bench`: runs, saves as it goes, shows what was saved, and ends with 1 where a path is wrong."""

import json
from pathlib import Path
from typing import Any

import pytest

from semisparse.cli.bench_tables import WIDTH
from semisparse.cli.common import WRONG_INPUT
from semisparse.selfcheck import files, numerics
from semisparse.selfcheck.comparing import Found
from tests.cli.shell import semisparse
from tests.selfcheck.reports import report

RIGHT, WRONG = Found(1.0, 2.0, "dx", "twice"), Found(3.0, 2.0, "dW", "twice")


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> list[Found]:
    """What the paths find."""
    outcomes = [RIGHT]
    monkeypatch.setattr(numerics, "paths", lambda: {"one": lambda setting: outcomes[0]})
    return outcomes


def test_it_checks_saves_and_shows_what_it_saved(found: list[Found], tmp_path: Path) -> None:
    outcome = semisparse("bench", "--quick", "--save", tmp_path / "bench.json")
    assert outcome.code == 0 and "numerics 1 of 1: one" in outcome.err
    assert "Numerics: 1 right, 0 wrong, 0 skipped." in outcome.out and "Nothing was timed." in outcome.out
    again = semisparse("bench", "--show", tmp_path / "bench.json")
    assert (again.code, again.out) == (0, outcome.out)
    content = json.loads((tmp_path / "bench.json").read_text())
    assert json.loads(semisparse("bench", "--show", tmp_path / "bench.json", "--json").out) == content
    assert content["checks"][0]["where"] == "dx"


def test_a_wrong_path_ends_it_with_1(found: list[Found], tmp_path: Path) -> None:
    found[0] = WRONG
    outcome = semisparse("bench", "--save", tmp_path / "bench.json", "--json")
    assert outcome.code == 1 and "a path computes something wrong" in outcome.err
    assert json.loads(outcome.out)["checks"][0]["outcome"] == "fail"
    assert files.read(tmp_path / "bench.json").failed


def test_what_was_found_on_a_gpu_fits_80_columns(tmp_path: Path) -> None:
    files.write(tmp_path / "bench.json", report())
    outcome = semisparse("bench", "--show", tmp_path / "bench.json")
    lines = outcome.out.splitlines()
    assert outcome.code == 0 and max(map(len, lines)) <= WIDTH == 80
    (line,) = [line for line in lines if line.startswith("16384 x 4096 x 11008 ")]
    assert line.split()[5::4] == ["dense", "1.00"]
    assert any("verified" in line and "kernel" in line for line in lines)
    assert any(line.split()[-5:] == ["algorithm", "17", "100", "150", "tuned"] for line in lines)
    assert "4096 x 13312 x 1024 bfloat16 dW dense 90 80 shipped" in [" ".join(line.split()) for line in lines]
    assert any(line.split() == ["2:4", "12.80", "1.250"] for line in lines)
    assert "model: raised: RuntimeError: no" in lines
    assert any("fp8 + 2:4 + mvue: out of memory" in line for line in lines)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--show", "none.json"), "--show='none.json' cannot be read: No such file"),
        (("--show", "none.json", "--quick"), "reads a file and checks nothing"),
        (("--budget", "0"), "--budget=0.0 must be a positive number"),
        (("--save", "none/bench.json"), "--save='none/bench.json' cannot be written"),
    ],
    ids=str,
)
def test_wrong_input_ends_with_one_line(arguments: tuple[Any, ...], said: str, found: list[Found]) -> None:
    outcome = semisparse("bench", *arguments)
    assert (outcome.code, outcome.err.count("\n")) == (WRONG_INPUT, 1)
    assert said in outcome.err
