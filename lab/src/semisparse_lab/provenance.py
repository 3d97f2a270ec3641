"""Which version of the source made a result."""

import os
import subprocess
from pathlib import Path


def commit() -> str | None:
    """The git commit of this source tree, with "+changes" if files differ from it; None for an installed package.

    SEMISPARSE_COMMIT, where it is set, names it instead: a copy of the tree may have another history or none.
    """
    if named := os.environ.get("SEMISPARSE_COMMIT"):
        return named
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return None
    try:
        head = _git(root, "rev-parse", "HEAD")
        return f"{head}+changes" if _git(root, "status", "--porcelain") else head
    except (OSError, subprocess.SubprocessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
