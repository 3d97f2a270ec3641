"""Entry point of the `semisparse-lab` command. Heavy packages are imported inside the commands: --help stays quick."""

import sys
from typing import Annotated

import typer

import semisparse_lab
from semisparse_lab.cli import experiments
from semisparse_lab.cli.evaluate import evaluate
from semisparse_lab.cli.train import train


def build_app() -> typer.Typer:
    """The typer application with its commands."""
    app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

    def show_version(wanted: bool) -> None:
        if wanted:
            typer.echo(f"semisparse-lab {semisparse_lab.__version__}")
            raise typer.Exit

    @app.callback()
    def options(
        version: Annotated[
            bool, typer.Option("--version", help="Print the version and exit.", callback=show_version, is_eager=True)
        ] = False,
    ) -> None:
        """Experiments with 2:4 sparse training: see what it does to accuracy and speed."""

    for command in (train, evaluate):
        app.command()(command)
    app.add_typer(experiments.build_group(), name="experiment")
    return app


def run() -> None:
    """Run the command line; exit code 2 for wrong input, with one line that says what is wrong.

    Ctrl-C inside a command is the command's to answer (see typed_errors); here it ends what comes before and after.
    """
    try:
        build_app()()
    except KeyboardInterrupt:
        print("interrupted: nothing was written, no file was changed", file=sys.stderr)
        raise SystemExit(130) from None
