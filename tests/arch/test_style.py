"""Sizes of files and functions, and that nothing names a machine."""

import ast
import re
from pathlib import Path

import pytest

from tests.arch.source import PACKAGE, ROOT

FILE_LINES = 400
FUNCTION_LINES = 60
KERNEL_LINES = 120
LINE_LENGTH = 120

FOLDERS = ("src", "csrc", "docs", "tests", "benchmarks", "examples", "lab")
PYTHON = sorted([*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))])
CPP = sorted(path for pattern in ("*.cpp", "*.h") for path in (ROOT / "csrc").rglob(pattern))
LIBRARIES = [path for path in PYTHON if PACKAGE in path.parents or ROOT / "lab" / "src" in path.parents]
PATTERNS = ("*.md", "*.toml", "*.txt", "Makefile", ".ci/*", "docs/**/*.md", "benchmarks/**/*.json",
            "benchmarks/**/*.md", "src/**/*.json", "tests/*.json", "tests/*.md", "lab/*.md", "lab/*.toml")  # fmt: skip
TEXT = [*PYTHON, *CPP, *(path for pattern in PATTERNS for path in sorted(ROOT.glob(pattern)) if path.is_file())]
# Home and scratch folders of one machine; the first slash is written apart so that this file passes too.
MACHINE_PATH = re.compile(r"(?<![\w.~$}])/" + r"(?:work|root|home|Users|mnt|scratch)/[\w.]")


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", [*PYTHON, *CPP], ids=name)
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= FILE_LINES


def is_kernel(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether triton compiles it."""
    return any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)


@pytest.mark.parametrize("path", LIBRARIES, ids=name)
def test_functions_are_short(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert lines <= (KERNEL_LINES if is_kernel(node) else FUNCTION_LINES), node.name


@pytest.mark.parametrize("path", TEXT, ids=name)
def test_no_file_names_a_path_of_one_machine(path: Path) -> None:
    found = MACHINE_PATH.findall(path.read_text())
    assert not found


@pytest.mark.parametrize("line", ["cd /" + "work/main", "open('/" + "root/x')", "'/" + "home/me/data'"])
def test_the_search_for_paths_finds_them(line: str) -> None:
    assert MACHINE_PATH.search(line)


@pytest.mark.parametrize(
    "line", ["~/" + "work/x", "https://a.b/" + "home/", "(root)", "/" + "homework/1", "a/" + "work/b"]
)
def test_the_search_for_paths_leaves_others_alone(line: str) -> None:
    assert not MACHINE_PATH.search(line)


@pytest.mark.parametrize("path", LIBRARIES, ids=name)
def test_user_errors_are_never_asserts_on_arguments(path: Path) -> None:
    if "testing" in path.parts:
        return  # its job is to raise AssertionError
    tree = ast.parse(path.read_text())
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef) and not function.name.startswith("_") and not is_kernel(function):
            arguments = {argument.arg for argument in (*function.args.args, *function.args.kwonlyargs)} - {
                "self",
                "cls",
            }
            for node in ast.walk(function):
                if isinstance(node, ast.Assert):
                    used = {part.id for part in ast.walk(node.test) if isinstance(part, ast.Name)}
                    assert not used & arguments, f"{function.name} asserts on {sorted(used & arguments)}"
