"""`semisparse bench`: the self-check of this machine, and a saved one read back."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from semisparse.cli.common import typed_errors

FAILED = 1
"""Exit code where a path computes something wrong here."""


def bench(
    context: typer.Context,
    quick: Annotated[bool, typer.Option("--quick", help="Numerics and layouts only; nothing is timed.")] = False,
    budget: Annotated[float | None, typer.Option(help="Seconds for all parts together. Default: 300.")] = None,
    save: Annotated[Path | None, typer.Option(metavar="FILE", help="Keep the results, as they come.")] = None,
    show: Annotated[Path | None, typer.Option(metavar="FILE", help="Print a saved self-check; nothing runs.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Check this machine: is every path right, what was found, and what four layers and a model gain."""
    kept: list[Path] = []
    with typed_errors(context, kept):
        from semisparse.cli.bench_tables import show_report
        from semisparse.errors import ConfigError
        from semisparse.selfcheck import files
        from semisparse.selfcheck.contents import Report
        from semisparse.selfcheck.running import BUDGET, selfcheck

        if show is not None:
            if quick or budget is not None or save is not None:
                raise ConfigError(f"show={str(show)!r} reads a file and checks nothing: leave the other options out")
            report = files.read(show)
        else:

            def keep(found: Report) -> None:
                if save is not None:
                    files.write(save, found)
                    kept[:] = [save]

            with _progress() as tell:
                report = selfcheck(quick=quick, budget=BUDGET if budget is None else budget, progress=tell, keep=keep)
        if as_json:
            typer.echo(json.dumps(files.document(report), indent=1, allow_nan=False))
        else:
            show_report(report)
    if report.failed and show is None:
        typer.echo("a path computes something wrong on this machine: see the table of numerics", err=True)
        raise typer.Exit(FAILED)


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """On a terminal one line that changes, with a sign of life; in a pipe a line each. On standard error."""
    if not sys.stderr.isatty():
        yield lambda line: typer.echo(line, err=True)
        return
    from rich.console import Console
    from rich.text import Text

    with Console(stderr=True, highlight=False).status("starts") as status:
        yield lambda line: status.update(Text(line))
