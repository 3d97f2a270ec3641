"""Rich output: the table of results and a progress bar that is silent where nobody watches."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from semisparse_lab.report.run_report import TableRow
from semisparse_lab.train import loop as training


def results_table(rows: Sequence[TableRow]) -> Table:
    """The table of the runs."""
    table = Table("configuration")
    for header in ("test accuracy", "difference to dense", "seconds a step", "peak memory"):
        table.add_column(header, justify="right")
    for row in rows:
        table.add_row(
            row.name,
            "diverged" if row.accuracy is None else f"{row.accuracy:.2f} %",
            "" if row.difference is None else f"{row.difference:+.2f} points",
            "" if row.seconds_per_step is None else f"{row.seconds_per_step:.4f}",
            "" if row.peak_memory is None else f"{row.peak_memory / 2**20:.0f} MiB",
        )
    return table


@contextmanager
def progress_bar(name: str) -> Iterator[Callable[[training.Progress], None]]:
    """A bar on standard error for one run, as fit's on_progress; nothing unless both outputs are terminals."""
    if not (sys.stdout.isatty() and sys.stderr.isatty()):
        yield lambda progress: None
        return
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

        def show(progress: training.Progress) -> None:
            nonlocal accuracy
            if progress.record is not None:
                accuracy = f", validation {100 * progress.record.validation.accuracy:.1f} %"
            bar.update(run, total=progress.total_steps, completed=progress.step, state=f"{progress.phase}{accuracy}")

        yield show
