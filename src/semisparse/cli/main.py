"""Entry point of the `semisparse` command. Heavy packages are imported inside the commands, so --help stays quick."""

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import typer


def build_app() -> "typer.Typer":
    """The typer application with its commands. Raises ImportError where the cli extra is not installed."""
    import rich  # noqa: F401  (asked for here, so that it is missed before a command has run for minutes)
    import typer

    from semisparse.cli.env import env
    from semisparse.cli.evaluate import evaluate
    from semisparse.cli.train import train

    app = typer.Typer(
        help="Train with 2:4 sparsity: see what it does to accuracy and speed.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    for command in (train, evaluate, env):
        app.command()(command)
    return app


def run() -> None:
    """Run the command line; exit code 2 for wrong input, with one line that says what is wrong."""
    try:
        app = build_app()
    except ImportError as error:
        if error.name not in ("typer", "rich"):
            raise
        print(f"error: the semisparse command needs {error.name}: pip install 'semisparse[cli]'", file=sys.stderr)
        raise SystemExit(2) from None
    app()


if __name__ == "__main__":
    run()
