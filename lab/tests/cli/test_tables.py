"""What the commands draw: the table, and progress as a bar or as lines."""

import io
import sys
from dataclasses import replace

import pytest
from rich.console import Console

from lab.tests.made_runs import DENSE, DIVERGED, MIXED, UNTIMED, documents
from semisparse_lab.cli.tables import LINES_PER_RUN, progress_for, results_table
from semisparse_lab.train.loop import Progress
from semisparse_lab.train.results import EpochRecord, RunResult, Scores


class Screen(io.StringIO):
    """A stream that is a terminal, or not."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


def cells(*results: RunResult) -> list[list[str]]:
    screen = io.StringIO()
    Console(file=screen, width=120).print(results_table(documents(*results)))
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in screen.getvalue().splitlines() if "│" in line]


def test_each_run_is_compared_with_the_first_and_what_was_not_measured_stays_empty() -> None:
    assert cells(DENSE, MIXED, UNTIMED) == [
        ["dense", "90.00 %", "", "0.5000", "1 MiB"],
        ["mixed", "87.50 %", "-2.50 points", "0.3333", "1 MiB"],
        ["untimed", "95.00 %", "+5.00 points", "", ""],
    ]


def test_nothing_is_compared_with_a_run_that_diverged() -> None:
    assert [row[1:3] for row in cells(DENSE, DIVERGED, MIXED)] == [
        ["90.00 %", ""],
        ["diverged", ""],
        ["87.50 %", "-2.50 points"],
    ]
    assert [row[1:3] for row in cells(DIVERGED, MIXED)] == [["diverged", ""], ["87.50 %", ""]]


@pytest.mark.parametrize(("out", "err"), [(True, True), (True, False), (False, True), (False, False)])
def test_progress_is_a_bar_on_stderr_where_both_outputs_are_terminals_and_lines_elsewhere(
    out: bool, err: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    screens = Screen(out), Screen(err)
    monkeypatch.setattr(sys, "stdout", screens[0])
    monkeypatch.setattr(sys, "stderr", screens[1])
    with progress_for("fully sparse") as show:
        show(Progress("fully sparse", 1, 4, "sparse"))
        show(Progress("fully sparse", 4, 4, "dense", EpochRecord(4, 0.5, Scores(0.5, 0.875))))
    if out and err:
        assert all(part in screens[1].getvalue() for part in ("fully sparse", "4/4", "dense", "validation 87.5 %"))
        assert screens[0].getvalue() == ""
    else:
        assert screens[0].getvalue() == "fully sparse: step 4 of 4, dense, validation 87.5 %, 0 s\n"
        assert screens[1].getvalue() == ""


@pytest.mark.parametrize("epochs", [1, 7, 10, 1000])
def test_a_long_run_prints_some_lines_and_always_its_last_epoch(epochs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", Screen(False))
    record = EpochRecord(0, 0.5, Scores(0.5, 0.5))
    with progress_for("x") as show:
        for epoch in range(1, epochs + 1):
            show(Progress("x", 3 * epoch, 3 * epochs, "sparse"))
            show(Progress("x", 3 * epoch, 3 * epochs, "sparse", replace(record, step=3 * epoch)))
    lines = sys.stdout.getvalue().splitlines()
    assert len(lines) == min(epochs, LINES_PER_RUN)
    assert lines[-1].startswith(f"x: step {3 * epochs} of {3 * epochs}")
