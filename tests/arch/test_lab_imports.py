"""The lab stands on the library's public names, as any other user does; the library does not know the lab."""

import ast
import re
from pathlib import Path

import pytest

from tests.arch.source import FILES, ROOT

LAB = sorted((ROOT / "lab" / "src" / "semisparse_lab").rglob("*.py"))
PUBLIC = set(
    re.findall(r"^\| `(semisparse\.[\w.]+)` \|", (ROOT / "docs" / "public.md").read_text(), flags=re.MULTILINE)
)
# Why the lab reaches further, module by module.
EXCEPTIONS = {
    "semisparse.documents": "results carry a checksum as plans do",
    "semisparse.files": "results and checkpoints are written as plans are",
    "semisparse.stopwatch": "a clock that jumps disturbs a training as it does a plan",
    "semisparse.environment": "results and tables say what semisparse env says",
    "semisparse.cli.common": "commands of both distributions end in the same way",
    "semisparse.gemm.engine": "results say how many sparse products ran, which nothing public counts",
}
# The lab's own levels: a file imports only its own level and lower ones.
LEVELS = (
    {"", "errors", "checks", "strict_json", "output", "interrupts", "provenance", "commands"},
    {"models", "data"},
    {"tasks", "train"},
    {"experiment", "checkpoint"},
    {"report"},
    {"pipeline"},
    {"studies"},
    {"cli", "__main__"},
)
LEVEL_OF = {name: number for number, names in enumerate(LEVELS) for name in names}


def module_name(path: Path) -> str:
    """Dotted name below semisparse_lab."""
    parts = path.relative_to(ROOT / "lab" / "src" / "semisparse_lab").with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


NAMES = {module_name(path): path for path in LAB}


def lab_imports(path: Path) -> set[str]:
    """Modules of the lab that a file imports, by their names below semisparse_lab."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "the lab imports by full names"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    below = {name.partition(".")[2] for name in found if name.split(".")[0] == "semisparse_lab"}
    return {name if name in NAMES else name.rpartition(".")[0] for name in below}


@pytest.mark.parametrize("path", LAB, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_of_the_lab_imports_no_higher_level(path: Path) -> None:
    mine = LEVEL_OF[module_name(path).split(".")[0]]
    assert lab_imports(path) <= NAMES.keys()
    higher = {name for name in lab_imports(path) if LEVEL_OF[name.split(".")[0]] > mine}
    assert not higher, f"{module_name(path)} [{mine}] imports {sorted(higher)}"


def test_no_import_of_the_lab_runs_in_a_circle() -> None:
    left = {name: lab_imports(path) - {name} for name, path in NAMES.items()}
    while leaves := {name for name, needs in left.items() if not needs & left.keys()}:
        left = {name: needs for name, needs in left.items() if name not in leaves}
    assert not left, f"in or behind a circle: {sorted(left)}"


def library_imports(path: Path) -> set[tuple[str, str]]:
    """(module, name) of each import from the library."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {(alias.name, "") for alias in node.names if alias.name.split(".")[0] == "semisparse"}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "semisparse":
            found |= {(node.module or "", alias.name) for alias in node.names}
    return found


@pytest.mark.parametrize("path", LAB, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_lab_imports_public_names_and_few_others(path: Path) -> None:
    further = {f"{module}.{name}" for module, name in library_imports(path) if module not in EXCEPTIONS} - PUBLIC
    assert not further, f"not in docs/public.md: {sorted(further)}"


def test_every_exception_is_needed() -> None:
    used = {module for path in LAB for module, _ in library_imports(path)}
    assert EXCEPTIONS.keys() <= used


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_library_does_not_know_the_lab(path: Path) -> None:
    assert "semisparse_lab" not in path.read_text()
