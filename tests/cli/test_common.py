"""How commands end: options in messages, ctrl-C, a version; and where they print."""

import subprocess
import sys
from pathlib import Path

import pytest
import typer
import typer.main

import semisparse as package
from semisparse.cli.common import console, with_flags
from semisparse.cli.main import run
from tests.cli.shell import semisparse


def context() -> typer.Context:
    """Of a command with options."""

    def train(
        data: str = "", data_dir: str = "", layers: str = "", seed: int = 0, out: str = "", batch_size: int = 1,
        lr: float = 1.0, sparse_fraction: float = 0.5, precision: str = "",
    ) -> None: ...  # fmt: skip

    app = typer.Typer(add_completion=False)
    app.command()(train)
    return typer.Context(typer.main.get_command(app))


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("sparse_fraction=2 must lie", "--sparse-fraction=2 must lie"),
        ("data='x' needs data_dir, the folder", "--data='x' needs --data-dir, the folder"),
        ("choose batch_size; or out=3.", "choose --batch-size; or --out=3."),
        ("leave data_dir.", "leave --data-dir."),
        ("other data and layers with a seed", "other data and layers with a seed"),
        ("out='a seed=3 data_dir' is", "--out='a seed=3 data_dir' is"),
        ('out="it\'s seed=3" is', '--out="it\'s seed=3" is'),
        ("the model's lr=3 and the run's", "the model's --lr=3 and the run's"),
        (
            "folder/data_dir/x, a/seed=3, data_dir.json, x.lr=3, my_lr=3, precisions=3",
            "folder/data_dir/x, a/seed=3, data_dir.json, x.lr=3, my_lr=3, precisions=3",
        ),
        ("steps=3 and context=4", "steps=3 and context=4"),
    ],
)
def test_messages_name_the_options_of_the_command(message: str, expected: str) -> None:
    assert with_flags(message, context()) == expected


def test_the_version_is_printed() -> None:
    outcome = semisparse("--version")
    assert (outcome.code, outcome.out, outcome.err) == (0, f"semisparse {package.__version__}\n", "")
    assert "--version" in semisparse("--help").out


def test_ctrl_c_in_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def pressed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("semisparse.environment.environment", pressed)
    outcome = semisparse("env")
    assert (outcome.code, outcome.out) == (130, "")
    assert outcome.err == "interrupted: nothing was written, no file was changed\n"


def test_ctrl_c_inside_an_import_ends_with_the_same_code(tmp_path: Path) -> None:
    (tmp_path / "as_module.py").write_text(
        "import sys, semisparse.environment as where; from semisparse.cli.main import run\n"
        "where.environment = lambda: exec('raise KeyboardInterrupt'); sys.argv = ['semisparse', 'env']; run()"
    )
    # Only with -m does CPython look at how the last exec ended.
    command = [sys.executable, "-m", "as_module"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert ended.returncode == 130, ended.stderr
    assert ended.stderr == "interrupted: nothing was written, no file was changed\n"


def test_ctrl_c_before_any_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def pressed() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("semisparse.cli.main.build_app", pressed)
    with pytest.raises(SystemExit) as ended:
        run()
    assert ended.value.code == 130
    assert capsys.readouterr().err.startswith("interrupted: nothing was written")


@pytest.mark.parametrize("terminal", [True, False])
def test_a_pipe_gets_lines_of_a_fixed_width_without_markup(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    monkeypatch.setenv("COLUMNS", "77")
    screen = console()
    assert screen.width == (77 if terminal else 120)
    screen.print("[bold] 1 :smile: [/nothing]")
    assert capsys.readouterr().out == "[bold] 1 :smile: [/nothing]\n"
