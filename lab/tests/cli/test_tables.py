"""What the commands draw: the table and the progress bar."""

import io
import sys

import pytest
from rich.console import Console

from semisparse_lab.cli.tables import progress_bar, results_table
from semisparse_lab.report.run_report import TableRow
from semisparse_lab.train.loop import Progress
from semisparse_lab.train.results import EpochRecord, Scores


class Screen(io.StringIO):
    """A stream that is a terminal, or not."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


def test_what_could_not_be_measured_stays_empty() -> None:
    rows = [TableRow("dense", 98.765, None, 0.01234, 5 * 2**20), TableRow("other", 99.0, 0.235, None, None),
            TableRow("third", None, None, 0.5, None)]  # fmt: skip
    screen = io.StringIO()
    Console(file=screen, width=120).print(results_table(rows))
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in screen.getvalue().splitlines() if "│" in line]
    assert cells == [["dense", "98.77 %", "", "0.0123", "5 MiB"], ["other", "99.00 %", "+0.23 points", "", ""],
                     ["third", "diverged", "", "0.5000", ""]]  # fmt: skip


@pytest.mark.parametrize(("out", "err"), [(True, True), (True, False), (False, True), (False, False)])
def test_the_bar_shows_on_stderr_where_both_outputs_are_terminals(
    out: bool, err: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    screens = Screen(out), Screen(err)
    monkeypatch.setattr(sys, "stdout", screens[0])
    monkeypatch.setattr(sys, "stderr", screens[1])
    with progress_bar("fully sparse") as show:
        show(Progress("fully sparse", 1, 4, "sparse"))
        show(Progress("fully sparse", 4, 4, "dense", EpochRecord(4, 0.5, Scores(0.5, 0.875))))
    shown = screens[1].getvalue()
    if out and err:
        assert all(part in shown for part in ("fully sparse", "4/4", "dense", "validation 87.5 %"))
    else:
        assert shown == ""
    assert screens[0].getvalue() == ""
