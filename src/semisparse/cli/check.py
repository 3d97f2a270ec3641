"""`semisparse check`: which weights of a checkpoint are 2:4, and along which axis."""

import json
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from semisparse.cli.common import console, typed_errors

if TYPE_CHECKING:
    from semisparse.checkpoint import CheckpointReport

NOT_SPARSE = 1
"""Exit code where a required weight is not 2:4."""


def check(
    context: typer.Context,
    path: Annotated[Path, typer.Argument(help="A .safetensors file, the index of a sharded one, or their folder.")],
    require: Annotated[
        list[str] | None,
        typer.Option(help="Exit with 1 unless every matrix whose name fits this pattern (*, ?) is 2:4 along columns."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Prove which weights of a checkpoint are 2:4, exactly: along columns (y), along rows (dx), or both."""
    with typed_errors(context):
        from semisparse.checkpoint import check_checkpoint

        report = check_checkpoint(path)
        failed = _failed(report, require or [])
        if as_json:
            weights = [asdict(weight) | {"axis": weight.axis} for weight in report]
            typer.echo(json.dumps({"weights": weights, "others": report.others, "failed": failed}, indent=1))
        else:
            _print(report)
    if failed:
        typer.echo(f"not 2:4 along columns: {', '.join(failed)}", err=True)
        raise typer.Exit(NOT_SPARSE)


def _failed(report: "CheckpointReport", patterns: list[str]) -> list[str]:
    from semisparse.errors import NoLayerMatchedError

    failed: dict[str, None] = {}
    for pattern in patterns:
        named = [weight for weight in report if fnmatchcase(weight.name, pattern)]
        if not named:
            raise NoLayerMatchedError(f"require={pattern!r} fits no matrix; the first is {report.weights[0].name!r}")
        failed |= {weight.name: None for weight in named if weight.axis not in ("both", "columns")}
    return list(failed)


def _print(report: "CheckpointReport") -> None:
    from rich.table import Table

    from semisparse.checkpoint import cells

    table = Table("tensor", "shape", "dtype", "2:4 along", box=None, header_style="bold")
    for heading in ("columns", "rows", "zeros"):
        table.add_column(heading, justify="right")
    for weight in report:
        table.add_row(*cells(weight))
    out = console()
    out.print(table)
    out.print(report.summary)
