"""Entry point of the `semisparse-lab` command. Heavy packages are imported inside the commands: --help stays quick."""

import sys

import typer

import semisparse_lab
from semisparse.cli.common import application
from semisparse_lab.cli import data, experiments
from semisparse_lab.cli.evaluate import evaluate
from semisparse_lab.cli.llama_linux import card
from semisparse_lab.cli.train import train


def build_app() -> typer.Typer:
    """The typer application with its commands."""
    about = "Experiments with 2:4 sparse training: see what it does to accuracy and speed."
    app = application("semisparse-lab", semisparse_lab.__version__, about)
    for command in (train, evaluate, card):
        app.command()(command)
    app.add_typer(data.build_group(), name="data")
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
