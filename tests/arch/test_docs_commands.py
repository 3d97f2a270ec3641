"""Every command that README and docs show exists: targets of make, semisparse's commands, options and checkpoints."""

import re
import shlex

import pytest
import typer.main

import semisparse.cli.main
import semisparse_lab.cli.main
from semisparse_lab.cli.train import DEFAULT_OUT
from semisparse_lab.studies.three_runs import FILES
from tests.arch.source import ROOT

BLOCK = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "lab" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
COMMANDS = [
    shlex.split(line, comments=True)
    for page in PAGES
    for block in BLOCK.findall(page.read_text())
    for line in block.splitlines()
]
PROGRAMS = {"semisparse": semisparse.cli.main, "semisparse-lab": semisparse_lab.cli.main}
OURS = [command for command in COMMANDS if command[0] in PROGRAMS]
# Commands that cards, README and docs name inside of sentences.
REMADE = [
    shlex.split(command)
    for page in [*PAGES, *sorted((ROOT / "benchmarks" / "cards").glob("*.md"))]
    for command in re.findall(r"`(semisparse(?:-lab)? [^`]+)`", page.read_text())
]


def test_the_pages_show_commands() -> None:
    assert {command[0] for command in COMMANDS} == {"make", "semisparse", "semisparse-lab", "python", "pip", "bash"}
    lab = {"train", "evaluate", "experiment", "data", "card"}
    assert {command[1] for command in OURS} == lab | {"env", "check", "plan", "bench"}
    assert len(REMADE) > 10


@pytest.mark.parametrize("command", [command for command in COMMANDS if command[0] == "make"], ids=" ".join)
def test_make_has_the_target(command: list[str]) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert command[1] in targets


@pytest.mark.parametrize("command", [command for command in COMMANDS if command[0] == "bash"], ids=" ".join)
def test_the_script_exists(command: list[str]) -> None:
    assert (ROOT / command[1]).is_file()


@pytest.mark.parametrize("command", [command for command in COMMANDS if command[0] == "python"], ids=" ".join)
def test_the_python_program_has_the_options(command: list[str]) -> None:
    program = (ROOT / command[1]).read_text()
    assert all(f'"{option}"' in program for option in command[2:] if option.startswith("--"))


@pytest.mark.parametrize("command", [*OURS, *REMADE], ids=" ".join)
def test_the_program_has_the_command_and_its_options(command: list[str]) -> None:
    known = typer.main.get_command(PROGRAMS[command[0]].build_app())
    words = command[1:]
    while hasattr(known, "commands"):
        known = known.commands[words.pop(0)]
    options = {option for parameter in known.params for option in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= options


@pytest.mark.parametrize("command", [command for command in OURS if command[1] == "evaluate"], ids=" ".join)
def test_the_checkpoint_that_is_evaluated_is_one_that_make_demo_writes(command: list[str]) -> None:
    made = re.search(r"^OUT \?= (\S+)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert made
    folder, _, name = command[2].partition("/")
    assert folder in (made[1], DEFAULT_OUT) and name in FILES
