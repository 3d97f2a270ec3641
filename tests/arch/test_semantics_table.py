"""Every test that docs/design.md names as the holder of a semantic is there, and no semantic is without one."""

import ast
import re

import pytest

from tests.arch.source import ROOT

HEADING = "## Semantics, and the tests that hold them"
ROW = re.compile(r"^\| (?P<semantic>[^|]+) \| (?P<tests>[^|]+) \|$", re.MULTILINE)
TEST = re.compile(r"`((?:lab/)?tests/[\w/]+\.py)::(test_\w+)`")


def rows() -> dict[str, list[tuple[str, str]]]:
    """Semantic -> (file, test function) of each test named for it."""
    section = (ROOT / "docs" / "design.md").read_text().split(HEADING)[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")][2:]
    found = [ROW.match(line) for line in lines]
    assert all(found), [line for line, row in zip(lines, found, strict=True) if not row]
    return {row["semantic"]: TEST.findall(row["tests"]) for row in found if row}


def functions(file: str) -> set[str]:
    """The test functions of a file, those in classes too; none where there is no such file."""
    path = ROOT / file
    if not path.exists():
        return set()
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}


def test_files_and_functions_that_are_not_there_are_noticed() -> None:
    here = "tests/arch/test_semantics_table.py"
    assert "test_files_and_functions_that_are_not_there_are_noticed" in functions(here)
    assert "test_nothing_of_this_name" not in functions(here)
    assert functions("tests/arch/no_such_file.py") == set()


def test_there_is_a_table() -> None:
    assert len(rows()) > 20


@pytest.mark.parametrize(("semantic", "tests"), list(rows().items()), ids=list(rows()))
def test_every_test_of_a_semantic_is_there(semantic: str, tests: list[tuple[str, str]]) -> None:
    assert tests, "name a test that holds it"
    missing = [f"{file}::{name}" for file, name in tests if name not in functions(file)]
    assert not missing


@pytest.mark.parametrize(("semantic", "tests"), list(rows().items()), ids=list(rows()))
def test_everything_listed_is_read_as_a_test(semantic: str, tests: list[tuple[str, str]]) -> None:
    line = next(line for line in (ROOT / "docs" / "design.md").read_text().splitlines() if f"| {semantic} |" in line)
    assert line.count("::") == len(tests)
