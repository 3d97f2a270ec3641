"""The watch over what commands write sees each way to write, and knows what belongs to an output."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import written

WAYS: dict[str, Callable[[Path], object]] = {
    "open": lambda path: open(path, "w").close(),
    "append": lambda path: open(path, "a").close(),
    "os.open": lambda path: os.close(os.open(path, os.O_CREAT | os.O_WRONLY)),
    "write_text": lambda path: path.write_text(""),
    "mkdir": lambda path: path.mkdir(),
    "makedirs": lambda path: os.makedirs(path / "below"),
    "link": lambda path: path.symlink_to("nowhere"),
    "rename": lambda path: (path.parent / "there").rename(path),
    "copy": lambda path: shutil.copy(path.parent / "there", path),
    "remove": lambda path: (shutil.copy(path.parent / "there", path), path.unlink()),
}


@pytest.mark.parametrize("way", WAYS)
def test_each_way_to_write_is_seen(way: str, tmp_path: Path) -> None:
    (tmp_path / "there").write_text("")
    with written.watched() as paths:
        WAYS[way](tmp_path / "made")
    assert tmp_path / "made" in paths
    before = len(paths)
    (tmp_path / "later").write_text("")
    assert len(paths) == before


def test_reading_is_no_writing(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("")
    with written.watched() as paths:
        (tmp_path / "there").read_text()
        list(tmp_path.iterdir())
    assert paths == []


@pytest.mark.parametrize(
    ("path", "found"),
    [("out", False), ("out/a/b", False), ("tmpx1.tmp", False), ("outer", True), ("out.json", True), ("notes.tmp", True),
     ("sub/tmpx1.tmp", True), ("../other", True), ("__pycache__/a.pyc", False)],
)  # fmt: skip
def test_what_belongs_to_an_output(path: str, found: bool, tmp_path: Path) -> None:
    written_path = Path(os.path.abspath(tmp_path / path))
    assert written.elsewhere([written_path], tmp_path / "out") == ([str(written_path)] if found else [])


def test_without_an_output_nothing_may_be_written(tmp_path: Path) -> None:
    assert written.elsewhere([tmp_path / "x"]) == [str(tmp_path / "x")]


def test_a_module_runs_as_with_python_m_and_what_it_wrote_is_listed(tmp_path: Path) -> None:
    source = "import sys; open(sys.argv[1], 'w'); sys.exit(int(sys.argv[2]))"
    (tmp_path / "writes.py").write_text(source)
    target, paths = tmp_path / "target", tmp_path / "paths"
    command = [sys.executable, written.__file__, str(paths), "writes", str(target), "3"]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(tmp_path)}, check=False)
    assert done.returncode == 3
    assert str(target) in paths.read_text().splitlines()
