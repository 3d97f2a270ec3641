"""The source tree as the architecture tests see it."""

import ast
from pathlib import Path

import semisparse

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(semisparse.__file__).parent
FILES = sorted(path for path in PACKAGE.rglob("*.py"))


def module_name(path: Path) -> str:
    """Dotted name below the package: "nn.base", "swap", "" for the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


NAMES = {module_name(path): path for path in FILES}


def imported(path: Path) -> set[str]:
    """Modules of the package that a file imports, wherever in the file, by their names below the package."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(["semisparse", *path.relative_to(PACKAGE).parts[:-1]][: -node.level + 1 or None])
            prefix = node.module or "" if not node.level else ".".join(filter(None, [base, node.module]))
            found |= {f"{prefix}.{alias.name}" for alias in node.names}
    return {_known(name.partition(".")[2]) for name in found if name.split(".")[0] == "semisparse"}


def _known(name: str) -> str:
    """The longest beginning of a dotted name that is a module: a.b.function -> a.b."""
    while name and name not in NAMES:
        name = name.rpartition(".")[0]
    return name
