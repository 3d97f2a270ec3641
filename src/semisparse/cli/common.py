"""What commands share: how they end when something is wrong, and where they print.

The commands of semisparse-lab use it too.
"""

import errno
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from semisparse.errors import SemiSparseError

if TYPE_CHECKING:
    from rich.console import Console

WRONG_INPUT, INTERRUPTED = 2, 130
"""Exit codes besides 0; the last is what shells give a command that ctrl-C ended."""
_WIDTH_OF_A_PIPE = 120

_QUOTED = re.compile(r"""((?<!\w)'(?:[^'\\]|\\.)*'|(?<!\w)"(?:[^"\\]|\\.)*")""")


def console() -> "Console":
    """A console on standard output; plain text of fixed width where that is not a terminal."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else _WIDTH_OF_A_PIPE, highlight=False, emoji=False, markup=False)


@contextmanager
def typed_errors(context: typer.Context, kept: Sequence[Path] = ()) -> Iterator[None]:
    """End a command without traceback, with one line on stderr, where its user can tell what happened.

    An error that semisparse raises on purpose ends with WRONG_INPUT and names the command's options instead of Python's
    arguments. Ctrl-C ends with INTERRUPTED and says what stays: the files in kept, to which the command adds; so does
    an output that takes no more text, with code 1.
    """
    try:
        yield
    except SemiSparseError as error:
        typer.echo(f"error: {with_flags(' '.join(str(error).split()), context)}", err=True)
        raise typer.Exit(WRONG_INPUT) from None
    except OSError as error:
        if error.errno != errno.ENOSPC or error.filename is not None:
            raise  # an error of a file that nobody foresaw, or a closed pipe, which typer ends by itself
        typer.echo(f"error: the output cannot be written: {error.strerror}; {_what_stays(kept)}", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        # Where ctrl-C met text that exec ran (dataclasses of an import do), CPython would at its exit still kill itself
        # by the signal; the next exec takes that back, and the exit code is ours.
        exec("")
        typer.echo(f"interrupted: {_what_stays(kept)}", err=True)
        raise typer.Exit(INTERRUPTED) from None


def with_flags(message: str, context: typer.Context) -> str:
    """Message with the options of the command where it names arguments: --batch-size=0 for batch_size=0.

    A name is one where a value follows ("seed=") or where it is no English word ("batch_size"); values in quotes and
    parts of paths stay as they are.
    """
    parts = _QUOTED.split(message)
    for parameter in context.command.params:
        flags = [option for option in parameter.opts if option.startswith("--")]
        if parameter.name is None or not flags:
            continue
        follows = r"(?![\w/\\-]|\.\w)" if "_" in parameter.name else "(?==)"
        name = re.compile(rf"(?<![\w./\\=-]){re.escape(parameter.name)}{follows}")
        parts[::2] = [name.sub(flags[0], part) for part in parts[::2]]
    return "".join(parts)


def _what_stays(kept: Sequence[Path]) -> str:
    """The files in kept, each once, by folder."""
    names: dict[Path, dict[str, None]] = {}
    for path in kept:
        names.setdefault(path.parent, {})[path.name] = None
    if not names:
        return "nothing was written, no file was changed"
    listed = "; ".join(f"{', '.join(found)} in {folder}" for folder, found in names.items())
    return f"kept {listed}; no other file was changed"
