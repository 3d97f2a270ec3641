"""The command line as a shell sees it."""

from dataclasses import dataclass
from pathlib import Path

from typer.testing import CliRunner

from semisparse.cli.main import build_app

TINY = ("--epochs", "2", "--batch-size", "128", "--device", "cpu")


@dataclass(frozen=True)
class Outcome:
    """What a command left behind, as a shell sees it."""

    code: int
    out: str
    err: str


def semisparse(*arguments: object) -> Outcome:
    """Run `semisparse ARGUMENTS` in this process, both outputs piped."""
    result = CliRunner().invoke(build_app(), [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Outcome(result.exit_code, result.stdout, result.stderr)


@dataclass(frozen=True)
class Trained:
    """A finished `semisparse train`."""

    folder: Path
    outcome: Outcome
