"""The lab stands on the library's public names, as any other user does; the library does not know the lab."""

import ast
from importlib import import_module
from pathlib import Path

import pytest

from tests.arch.source import FILES, ROOT

LAB = sorted((ROOT / "lab" / "src" / "semisparse_lab").rglob("*.py"))
# Modules whose names without an underscore are public: the root, and where users find recipes, errors and figures.
PUBLIC = {"semisparse", "semisparse.recipes", "semisparse.errors", "semisparse.config", "semisparse.metrics",
          "semisparse.environment"}  # fmt: skip
# Why the lab reaches further, module by module.
EXCEPTIONS = {
    "semisparse.cli.common": "commands of both distributions end in the same way",
    "semisparse.gemm.engine": "results say how many sparse products ran, which nothing public counts",
}


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
    for module, name in library_imports(path):
        assert module in PUBLIC | EXCEPTIONS.keys(), f"{module} is not public"
        assert not name.startswith("_")
        exported = getattr(import_module(module), "__all__", None)
        assert exported is None or name in exported, f"{module}.{name} is not public"


def test_every_exception_is_needed() -> None:
    used = {module for path in LAB for module, _ in library_imports(path)}
    assert EXCEPTIONS.keys() <= used


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_library_does_not_know_the_lab(path: Path) -> None:
    assert "semisparse_lab" not in path.read_text()
