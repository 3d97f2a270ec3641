"""`semisparse env`, and the command line as a whole."""

import sys

import pytest

import semisparse as semisparse_package
from semisparse.cli import main
from semisparse.environment import environment
from tests import fresh
from tests.cli.shell import semisparse


def test_it_prints_every_fact_and_every_capability_with_its_path_and_reason() -> None:
    outcome = semisparse("env")
    found = environment()
    assert (outcome.code, outcome.err) == (0, "")
    lines = outcome.out.splitlines()
    for name, value in found.facts.items():
        assert any(line.split(name, 1)[-1].strip() == value for line in lines if line.strip().startswith(name)), name
    for capability in found.capabilities:
        row = next(line for line in lines if line.strip().startswith(capability.name))
        assert capability.path.split()[0] in row
    assert f"On this machine's {found.device.upper()}:" in lines


def test_help_lists_the_commands() -> None:
    outcome = semisparse("--help")
    assert outcome.code == 0
    assert " env " in outcome.out


def test_an_unknown_command_is_refused() -> None:
    outcome = semisparse("trian")
    assert outcome.code == 2
    assert "trian" in outcome.err


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_without_the_extra_the_error_says_what_to_install(
    package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit) as ended:
        main.run()
    assert ended.value.code == 2
    assert (
        capsys.readouterr().err
        == f"error: the semisparse command needs {package}: pip install typer rich safetensors\n"
    )


def test_another_missing_import_is_not_blamed_on_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise ImportError("of our own", name="semisparse.cli.gone")

    monkeypatch.setattr(main, "build_app", broken)
    with pytest.raises(ImportError, match="of our own"):
        main.run()


@pytest.mark.parametrize("module", ["semisparse", "semisparse.cli.main"])
def test_the_module_runs_as_a_program(module: str) -> None:
    result = fresh.run("-m", module, "--version")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == f"semisparse {semisparse_package.__version__}\n"
