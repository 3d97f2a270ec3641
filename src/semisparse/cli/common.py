"""Shared by all commands, those of semisparse-lab included: error messages, exit codes and the console."""

import errno
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from semisparse.errors import SemiSparseError

if TYPE_CHECKING:
    from rich.console import Console

WRONG_INPUT, INTERRUPTED = 2, 130
"""Exit codes besides 0; 130 is what shells report for a command that ctrl-C ended."""
_WIDTH_OF_A_PIPE = 120

_QUOTED = re.compile(r"""((?<!\w)'(?:[^'\\]|\\.)*'|(?<!\w)"(?:[^"\\]|\\.)*")""")


def application(name: str, version: str, about: str) -> typer.Typer:
    """A typer application with --version and no commands yet.

    Args:
        name: Of the program, printed with its version.
        version: What --version prints.
        about: First line of --help.
    """
    app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

    def show_version(wanted: bool) -> None:
        if wanted:
            typer.echo(f"{name} {version}")
            raise typer.Exit

    @app.callback(help=about)
    def options(
        version: Annotated[
            bool, typer.Option("--version", help="Print the version and exit.", callback=show_version, is_eager=True)
        ] = False,
    ) -> None:
        """The options before any command."""

    return app


def console() -> "Console":
    """A console on standard output; plain text of fixed width if that is not a terminal."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else _WIDTH_OF_A_PIPE, highlight=False, emoji=False, markup=False)


@contextmanager
def typed_errors(context: typer.Context, kept: Sequence[Path] = ()) -> Iterator[None]:
    """End a command with one line on stderr instead of a traceback, for errors that its user can understand.

    A SemiSparseError ends it with exit code WRONG_INPUT; the message names the command's options instead of Python's
    arguments. Ctrl-C ends it with INTERRUPTED, a full disk under standard output with 1; both messages list the files
    that were written.

    Args:
        context: Of the command.
        kept: Files that the command has written so far; the command appends to it.
    """
    try:
        yield
    except SemiSparseError as error:
        typer.echo(f"error: {with_flags(' '.join(str(error).split()), context)}", err=True)
        raise typer.Exit(WRONG_INPUT) from None
    except OSError as error:
        if error.errno != errno.ENOSPC or error.filename is not None:
            raise  # an unexpected error of a file, or a closed pipe, which typer handles
        typer.echo(f"error: the output cannot be written: {error.strerror}; {_what_stays(kept)}", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        # If ctrl-C arrived inside exec (importing a module with dataclasses calls it), CPython would still kill itself
        # with the signal at exit. Another exec resets that, so that the exit code below is used.
        exec("")
        typer.echo(f"interrupted: {_what_stays(kept)}", err=True)
        raise typer.Exit(INTERRUPTED) from None


def with_flags(message: str, context: typer.Context) -> str:
    """Replace names of arguments in message by options of the command: --batch-size=0 for batch_size=0.

    A word counts as such a name if a value follows it ("seed=") or if it has an underscore ("batch_size"). Quoted
    values and parts of paths stay as they are.

    Args:
        message: Text of an error.
        context: Of the command.
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
    """A clause that lists the files in kept, each once, by folder."""
    names: dict[Path, dict[str, None]] = {}
    for path in kept:
        names.setdefault(path.parent, {})[path.name] = None
    if not names:
        return "nothing was written, no file was changed"
    listed = "; ".join(f"{', '.join(found)} in {folder}" for folder, found in names.items())
    return f"kept {listed}; no other file was changed"
