"""The lab's command line as a shell sees it."""

from dataclasses import dataclass
from pathlib import Path

from semisparse_lab.cli.main import build_app
from tests.cli.shell import Outcome, invoke

TINY = ("--epochs", "2", "--batch-size", "128", "--device", "cpu")


def semisparse_lab(*arguments: object) -> Outcome:
    """Run `semisparse-lab ARGUMENTS` in this process."""
    return invoke(build_app(), *arguments)


@dataclass(frozen=True)
class Trained:
    """A finished `semisparse-lab train`."""

    folder: Path
    outcome: Outcome
