"""Defects as data, and a copy of the source tree in which they are planted one at a time.

Each *.toml file of this folder is a list of defects. A defect is one line of the project and what a mistake would make
of it, with the tests that should see that. Those tests were written for another purpose, so that the share they kill
says how much the suite sees.
"""

import hashlib
import shutil
import tomllib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
COPIED = (
    "src",
    "csrc",
    "tests",
    "benchmarks",
    "examples",
    "lab",
    "docs",
    "pyproject.toml",
    "README.md",
    "CHANGELOG.md",
)
"""What tests read of the tree."""

_FIELDS = {"name", "file", "old", "new", "tests"}


class DefectError(Exception):
    """The list does not fit the tree: an entry is damaged, or its line is not there exactly once."""


@dataclass(frozen=True)
class Defect:
    """One line and what a mistake would make of it.

    Attributes:
        name: What is wrong, in a few words; unique.
        file: Relative to the project.
        old: Text that is in the file exactly once, within one line.
        new: What stands there instead.
        tests: Nodes of pytest that should fail.
        listed: The list that it is in.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    listed: str

    @property
    def native(self) -> bool:
        """Whether the native library must be built again."""
        return self.file.startswith("csrc/")

    def planted(self, text: str) -> str:
        """The content of the file with the defect.

        Args:
            text: Without it.

        Raises:
            DefectError: The line is not there exactly once.
        """
        if (found := text.count(self.old)) != 1:
            raise DefectError(f"{self.name}: {self.old!r} is {found} times in {self.file}; it must be there once")
        return text.replace(self.old, self.new)


def load(folder: Path = HERE) -> list[Defect]:
    """All defects, in the order of files and entries.

    Args:
        folder: With *.toml files.

    Raises:
        DefectError: An entry lacks a field, has another one, or repeats a name.
    """
    found: list[Defect] = []
    for path in sorted(folder.glob("*.toml")):
        for entry in tomllib.loads(path.read_text(encoding="utf-8"))["defect"]:
            if entry.keys() != _FIELDS or not entry["tests"]:
                raise DefectError(
                    f"{path.name}: {entry.get('name')!r} must have the fields {', '.join(sorted(_FIELDS))}"
                )
            if "\n" in entry["old"] + entry["new"] or entry["old"] == entry["new"]:
                raise DefectError(f"{path.name}: {entry['name']!r} must change one line")
            found.append(Defect(**{**entry, "tests": tuple(entry["tests"]), "listed": path.stem}))
    if len({defect.name for defect in found}) != len(found):
        raise DefectError("two defects have the same name")
    return found


def check(defects: Iterable[Defect], root: Path = ROOT) -> None:
    """Raise DefectError unless every line and every test file is where the list says.

    Args:
        defects: Any.
        root: Of the tree.
    """
    for defect in defects:
        defect.planted((root / defect.file).read_text(encoding="utf-8"))
        for node in defect.tests:
            if not (root / node.partition("::")[0]).is_file():
                raise DefectError(f"{defect.name}: there is no test {node}")


def turn(defects: Iterable[Defect], key: str, size: int) -> list[Defect]:
    """The defects whose turn it is: others for another key, the same ones for the same key.

    Args:
        defects: To choose from.
        key: Such as a commit or a week.
        size: Most that are chosen.
    """
    return sorted(defects, key=lambda one: hashlib.sha256(f"{key}\0{one.name}".encode()).digest())[:size]


def copy_tree(to: Path, root: Path = ROOT) -> None:
    """Copy what tests read, without compiled Python code.

    Args:
        to: A folder; made.
        root: Of the tree.
    """
    ignored = shutil.ignore_patterns("__pycache__", ".venv*", "*.egg-info", ".pytest_cache", ".hypothesis", "demo-out")
    to.mkdir(parents=True, exist_ok=True)
    for name in COPIED:
        if (root / name).is_dir():
            shutil.copytree(root / name, to / name, ignore=ignored)
        else:
            shutil.copy2(root / name, to / name)


@contextmanager
def planted(defect: Defect, tree: Path) -> Iterator[None]:
    """The defect is in the tree inside the block, and gone afterwards.

    Args:
        defect: Any.
        tree: A copy.
    """
    path = tree / defect.file
    whole = path.read_text(encoding="utf-8")
    path.write_text(defect.planted(whole), encoding="utf-8")
    try:
        yield
    finally:
        path.write_text(whole, encoding="utf-8")
