"""Entry point of the `semisparse` command. Heavy packages are imported inside the commands to keep --help fast."""

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import typer


def build_app() -> "typer.Typer":
    """The typer application with its commands.

    Raises:
        ImportError: The cli extra is not installed.
    """
    import rich  # noqa: F401  (imported here so that a missing package is reported before a command runs)

    import semisparse
    from semisparse.cli.bench import bench
    from semisparse.cli.check import check
    from semisparse.cli.common import application
    from semisparse.cli.env import env
    from semisparse.cli.plan import plan

    app = application("semisparse", semisparse.__version__, "2:4 sparse training in PyTorch: what this machine can do.")
    app.command()(env)
    app.command()(check)
    app.command()(plan)
    app.command()(bench)
    return app


def run() -> None:
    """Run the command line. Wrong input ends with exit code 2 and one line that says what is wrong.

    Ctrl-C inside a command is handled by typed_errors; here it is handled before and after the command.
    """
    try:
        build_app()()
    except KeyboardInterrupt:
        print("interrupted: nothing was written, no file was changed", file=sys.stderr)
        raise SystemExit(130) from None
    except ImportError as error:
        if error.name not in ("typer", "rich", "safetensors"):
            raise
        print(f"error: the semisparse command needs {error.name}: pip install typer rich safetensors", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    run()
