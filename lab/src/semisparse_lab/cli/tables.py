"""What commands draw: the table of results, and progress as a bar on a terminal, as lines elsewhere."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from semisparse.stopwatch import Stopwatch
from semisparse_lab.experiment import OnProgress
from semisparse_lab.train import loop

LINES_PER_RUN = 10
"""Lines of progress per run where there is no terminal, at most."""


def results_table(documents: Sequence[dict[str, Any]]) -> Table:
    """The table of runs, as run_document makes them; the others are compared with the first."""
    table = Table("configuration")
    for header in ("test accuracy", "difference to dense", "seconds per step", "peak memory"):
        table.add_column(header, justify="right")
    base = documents[0]["value"]
    for document in documents:
        value, seconds = document["value"], document["run"]["seconds_per_step"]
        memory = document["run"]["peak_memory"]["bytes"]
        compared = document is not documents[0] and value is not None and base is not None
        table.add_row(
            document["row_title"],
            "diverged" if value is None else f"{value:.2f} %",
            f"{value - base:+.2f} points" if compared else "",
            "" if seconds is None else f"{seconds:.4f}",
            "" if memory is None else f"{memory / 2**20:.0f} MiB",
        )
    return table


@contextmanager
def progress_for(name: str) -> Iterator[OnProgress]:
    """The on_progress of the run called name: a bar on standard error where both outputs are terminals, else lines."""
    if sys.stdout.isatty() and sys.stderr.isatty():
        with _bar(name) as show:
            yield show
    else:
        yield _lines(name)


def _lines(name: str) -> OnProgress:
    """Prints a line at the end of an epoch, LINES_PER_RUN lines at most, and always one at the end."""
    elapsed, printed = Stopwatch(), 0

    def show(progress: loop.Progress) -> None:
        nonlocal printed
        part = LINES_PER_RUN * progress.step // progress.total_steps
        if progress.record is not None and part > printed:
            printed = part
            print(
                f"{name}: step {progress.step} of {progress.total_steps}, {progress.phase}, "
                f"validation {100 * progress.record.validation.accuracy:.1f} %, {elapsed():.0f} s",
                flush=True,
            )

    return show


@contextmanager
def _bar(name: str) -> Iterator[OnProgress]:
    columns = (
        TextColumn("{task.description:<26}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        run = bar.add_task(name, total=None, state="")
        accuracy = ""

        def show(progress: loop.Progress) -> None:
            nonlocal accuracy
            if progress.record is not None:
                accuracy = f", validation {100 * progress.record.validation.accuracy:.1f} %"
            bar.update(run, total=progress.total_steps, completed=progress.step, state=f"{progress.phase}{accuracy}")

        yield show
