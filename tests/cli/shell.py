"""The command line as a shell sees it."""

from dataclasses import dataclass

import typer
from typer.testing import CliRunner

from semisparse.cli.main import build_app


@dataclass(frozen=True)
class Outcome:
    """What a command left behind, as a shell sees it."""

    code: int
    out: str
    err: str


def invoke(app: typer.Typer, *arguments: object) -> Outcome:
    """Run a command in this process, both outputs piped."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Outcome(result.exit_code, result.stdout, result.stderr)


def semisparse(*arguments: object) -> Outcome:
    """Run `semisparse ARGUMENTS`."""
    return invoke(build_app(), *arguments)
