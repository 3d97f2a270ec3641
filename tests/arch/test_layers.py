"""The levels of the package: a file imports only its own level and lower ones, and never in a circle."""

import ast
from pathlib import Path

import pytest

from tests.arch.source import FILES, NAMES, PACKAGE, imported, module_name

LEVELS = {
    1: {
        "errors",
        "arguments",
        "config",
        "documents",
        "exactness",
        "files",
        "forks",
        "masks",
        "pattern",
        "reference",
        "sampling",
        "stopwatch",
        "versions",
    },
    2: {"formats", "kernels", "gemm", "native"},
    3: {
        "calls",
        "tracing",
        "ops",
        "flops",
        "operands",
        "routes",
        "autograd",
        "functional",
        "autograd_fp8",
        "functional_fp8",
        "shared_tokens",
    },
    4: {"nn", "surgery"},
    # "" is the package itself, which collects the public names of the levels up to 5.
    5: {
        "schedule",
        "recipes",
        "metrics",
        "tuning",
        "_check",
        "_plan",
        "_tune",
        "planning",
        "selfcheck",
        "checkpoint",
        "unchanged",
        "environment",
        "",
    },
    6: {"cli", "integrations"},
    7: {"__main__"},
}
LEVEL_OF = {name: level for level, names in LEVELS.items() for name in names}
# Imports that the levels would allow and that are forbidden all the same: what is tested and its specification,
# engines and kernels.
FORBIDDEN = [
    ("kernels", "reference"),
    ("kernels", "gemm"),
    ("reference", "config"),
    ("formats", "kernels"),
    ("formats", "gemm"),
]

INSIDE = [path for path in FILES if module_name(path).split(".")[0] not in ("", "testing")]
EACH_FILE = pytest.mark.parametrize("path", INSIDE, ids=lambda path: str(path.relative_to(PACKAGE)))


def top(name: str) -> str:
    return name.split(".")[0]


def test_the_walk_sees_imports_of_every_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = PACKAGE / "nn" / "base.py"
    forms = {
        "import semisparse.ops": {"ops"},
        "import semisparse.nn.linear as x": {"nn.linear"},
        "from semisparse import ops, surgery": {"ops", "surgery"},
        "from semisparse.nn.base import refusal": {"nn.base"},
        "from semisparse import SparseConfig": {""},
        "from . import linear": {"nn.linear"},
        "from .linear import SemiSparseLinear": {"nn.linear"},
        "from .. import surgery": {"surgery"},
        "from ..surgery.swap import sparsify": {"surgery.swap"},
        "def f():\n    from semisparse import schedule": {"schedule"},
        "import torch, semisparsely": set(),
    }
    for text, expected in forms.items():
        monkeypatch.setattr(Path, "read_text", lambda self, text=text: text)
        assert imported(file) == expected, text


def test_every_file_has_a_level() -> None:
    assert len(INSIDE) > 10
    unknown = {top(module_name(path)) for path in INSIDE} - LEVEL_OF.keys()
    assert not unknown, f"give {sorted(unknown)} a level in LEVELS"


@EACH_FILE
def test_a_file_imports_no_higher_level(path: Path) -> None:
    level = LEVEL_OF[top(module_name(path))]
    higher = {name for name in imported(path) if LEVEL_OF.get(top(name), max(LEVELS) + 1) > level}
    assert not higher, f"{module_name(path)} [{level}] imports {sorted(higher)}"


@EACH_FILE
def test_forbidden_imports_do_not_occur(path: Path) -> None:
    name = module_name(path)
    met = {other for mine, other in FORBIDDEN if top(name) == mine and other in {top(n) for n in imported(path)}}
    assert not met, f"{name} imports {sorted(met)}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_the_package_does_not_import_testing(path: Path) -> None:
    if top(module_name(path)) != "testing":
        assert "testing" not in {top(name) for name in imported(path)}


def test_testing_imports_nothing_above_the_specification() -> None:
    for name, path in NAMES.items():
        if top(name) == "testing":
            assert {top(other) for other in imported(path)} <= {"testing", *LEVELS[1]}


def test_no_import_runs_in_a_circle() -> None:
    # A package imports its own files; that is not a circle.
    graph = {
        name: {other for other in imported(path) if other != name and not name.startswith(f"{other}.")}
        for name, path in NAMES.items()
    }
    left = dict(graph)
    while True:
        leaves = {name for name, needs in left.items() if not needs & left.keys()}
        if not leaves:
            break
        left = {name: needs for name, needs in left.items() if name not in leaves}
    assert not left, f"in or behind a circle: {sorted(left)}"


def guests(path: Path) -> set[str]:
    """Top-level packages a file imports anywhere."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add((node.module or "").split(".")[0])
    return found


@EACH_FILE
def test_triton_stays_in_kernels_and_nvmath_in_gemm(path: Path) -> None:
    home = {"triton": "kernels", "nvmath": "gemm"}
    for guest in guests(path) & home.keys():
        assert top(module_name(path)) == home[guest], f"{module_name(path)} imports {guest}"


@EACH_FILE
def test_only_autograd_holds_gradients(path: Path) -> None:
    words = {"Function", "register_autograd", "once_differentiable"}
    used = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)} & words
    assert not used or module_name(path) in ("autograd", "autograd_fp8")
