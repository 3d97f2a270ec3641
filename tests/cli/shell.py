"""The command line as a shell sees it; and each command that a test runs writes only where its arguments say."""

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import typer
import typer.main
from typer.testing import CliRunner

from semisparse.cli.main import build_app
from tests import written

OUTPUTS = ("--out", "--save", "--bundle")
"""Options that name what a command writes."""


@dataclass(frozen=True)
class Outcome:
    """What a command left behind, as a shell sees it."""

    code: int
    out: str
    err: str


def invoke(app: typer.Typer, *arguments: object) -> Outcome:
    """Run a command in this process, both outputs piped."""
    words = [str(argument) for argument in arguments]
    with written.watched() as paths:
        result = CliRunner().invoke(app, words)
    found = written.elsewhere(paths, *outputs(app, words))
    assert not found, f"{shlex.join(words)} wrote {found}"
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Outcome(result.exit_code, result.stdout, result.stderr)


def semisparse(*arguments: object) -> Outcome:
    """Run `semisparse ARGUMENTS`."""
    return invoke(build_app(), *arguments)


def outputs(app: typer.Typer, words: Sequence[str]) -> Iterator[Path]:
    """The files and folders that a command may write: those that it is given, and the defaults of the others.

    Args:
        app: The application.
        words: The command and its arguments.
    """
    command = typer.main.get_command(app)
    for word in words:
        command = getattr(command, "commands", {}).get(word, command)
    for parameter in getattr(command, "params", []):
        for option in set(parameter.opts) & set(OUTPUTS):
            named = [value for name, value in pairwise(words) if name == option]
            if named or parameter.default is not None:
                yield Path(named[-1] if named else parameter.default)
            elif option == "--out":  # of `card`: the folder of results that is its argument
                yield Path(words[1])
