"""Every command that README and docs show exists: targets of make, semisparse's commands, options and checkpoints."""

import re
import shlex

import pytest
import typer.main

from semisparse.cli.main import build_app
from semisparse.demo.runs import three_runs
from tests.arch.source import ROOT

BLOCK = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMMANDS = [
    shlex.split(line, comments=True)
    for page in PAGES
    for block in BLOCK.findall(page.read_text())
    for line in block.splitlines()
]
OURS = [command for command in COMMANDS if command[0] == "semisparse"]


def test_the_pages_show_commands() -> None:
    assert {command[0] for command in COMMANDS} == {"make", "semisparse", "python"}
    assert {command[1] for command in OURS} == {"train", "evaluate", "env"}


@pytest.mark.parametrize("command", [command for command in COMMANDS if command[0] == "make"], ids=" ".join)
def test_make_has_the_target(command: list[str]) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert command[1] in targets


@pytest.mark.parametrize("command", [command for command in COMMANDS if command[0] == "python"], ids=" ".join)
def test_the_program_has_the_options(command: list[str]) -> None:
    program = (ROOT / command[1]).read_text()
    for option in command[2:]:
        if option.startswith("--"):
            assert option in program or f"{option[2:].replace('-', '_')}: Annotated" in program


@pytest.mark.parametrize("command", OURS, ids=" ".join)
def test_semisparse_has_the_command_and_its_options(command: list[str]) -> None:
    known = typer.main.get_command(build_app()).commands[command[1]]
    options = {option for parameter in known.params for option in parameter.opts}
    assert {word for word in command if word.startswith("--")} <= options


@pytest.mark.parametrize("command", [command for command in OURS if command[1] == "evaluate"], ids=" ".join)
def test_the_checkpoint_that_is_evaluated_is_one_that_make_demo_writes(command: list[str]) -> None:
    folder = re.search(r"^OUT \?= (\S+)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert folder
    assert command[2] in {f"{folder[1]}/{plan.slug}.safetensors" for plan in three_runs(0.7)}
