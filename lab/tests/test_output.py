"""The output folder is checked before any training, and nothing is deleted."""

import os
from pathlib import Path

import pytest

from semisparse.errors import ConfigError
from semisparse_lab import output
from semisparse_lab.errors import OutputExistsError

FILES = ("results.json", "curves.png", "dense.safetensors")


def ready(folder: Path, *, force: bool) -> None:
    output.prepare_output(folder, FILES, force=force)


def test_a_folder_with_anything_in_it_is_refused_unless_forced(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match="--force"):
        ready(tmp_path, force=False)
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(OutputExistsError, match="--force"):
        ready(tmp_path, force=False)
    assert {path.name for path in tmp_path.iterdir()} == {"notes.txt", "results.json"}
    ready(tmp_path, force=True)
    # Nothing is deleted before there is something to put in its place.
    assert {path.name for path in tmp_path.iterdir()} == {"notes.txt", "results.json"}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_a_name_that_no_file_can_take_is_refused_before_training(tmp_path: Path, name: str, kind: str) -> None:
    path = tmp_path / name
    path.mkdir() if kind == "folder" else os.mkfifo(path)
    with pytest.raises(ConfigError, match=rf"out=.* cannot be written: {name} is there and not a file"):
        ready(tmp_path, force=True)
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_as_output_folder_is_followed_and_one_to_nothing_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    ready(tmp_path / "link", force=False)
    for name in ("nowhere", "itself"):
        (tmp_path / name).symlink_to(tmp_path / {"nowhere": "missing", "itself": "itself"}[name])
        with pytest.raises(OutputExistsError, match="is a link to nothing"):
            ready(tmp_path / name, force=True)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "to a file").symlink_to(tmp_path / "file")
    with pytest.raises(OutputExistsError, match="is a file, not a folder"):
        ready(tmp_path / "to a file", force=True)
    with pytest.raises(ConfigError, match="cannot be written: File name too long"):
        ready(tmp_path / ("x" * 300), force=True)


def test_an_empty_folder_or_none_is_ready(tmp_path: Path) -> None:
    ready(tmp_path, force=False)
    ready(tmp_path / "a" / "b", force=False)
    assert (tmp_path / "a" / "b").is_dir()


def test_a_folder_that_cannot_be_made_or_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputExistsError, match="is a file"):
        ready(tmp_path / "file", force=True)
    with pytest.raises(ConfigError, match=r"out='.*below' cannot be written: Not a directory"):
        ready(tmp_path / "file" / "below", force=False)
    monkeypatch.setattr(
        output.os, "access", lambda path, mode: False
    )  # the tests may run as root, who may write anywhere
    with pytest.raises(ConfigError, match="no permission to write there"):
        ready(tmp_path / "new", force=False)
