"""Files are replaced in one step: whatever happens on the way, the old version or the new one is there."""

import os
import stat
from pathlib import Path

import pytest

from semisparse import files
from tests import fresh
from tests.arch.source import ROOT

# Children are forked from one process that has imported everything, and killed there. At random moments: tests/faults.
OVERWRITE = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from semisparse_lab.checkpoint import file as checkpoint
from semisparse_lab.models.vit import build_model
from lab.tests.toys import MODEL

path = Path(sys.argv[1]) / "model.safetensors"
models = [build_model(MODEL, seed=seed) for seed in (1, 2)]
states = [model.state_dict() for model in models]
checkpoint.save(path, models[0], {"seed": 0})

def check():
    found = checkpoint.load(path)
    state = states[found.info["seed"]]
    assert all(torch.equal(tensor, state[name]) for name, tensor in found.model.state_dict().items())
    return found.info["seed"]

def in_child(work):
    child = os.fork()
    if not child:
        try:
            work()
        finally:
            os._exit(0)
    return child

# Killed before each call that changes anything.
def killed_before(call):
    calls = 0
    def counted(real):
        def wrapped(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)
        return wrapped
    for name in ("open", "fdopen", "fsync", "replace"):
        setattr(os, name, counted(getattr(os, name)))
    checkpoint.save(path, models[1], {"seed": 1})

results = []
for call in range(1, 9):
    checkpoint.save(path, models[0], {"seed": 0})
    _, status = os.waitpid(in_child(lambda: killed_before(call)), 0)
    results.append((status == signal.SIGKILL, check()))
assert results[0] == (True, 0) and results[-1] == (False, 1) and results == sorted(results, key=lambda r: r[1]), results
checkpoint.save(path, models[1], {"seed": 1})
print(sorted(os.listdir(path.parent)))
"""


def orphan(path: Path) -> Path:
    """A file as a killed process leaves it."""
    descriptor, temporary = files._create(path)
    os.close(descriptor)
    return temporary


def test_a_killed_overwrite_leaves_the_old_checkpoint_or_the_new_one_and_the_next_write_no_orphan(tmp_path):
    done = fresh.run("-c", OVERWRITE, tmp_path, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "['model.safetensors']\n"


def test_a_failed_write_leaves_the_old_file_and_no_debris(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    files.write_atomically(path, b"old")

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        files.write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_file_and_folder_are_synced_in_this_order(tmp_path, monkeypatch):
    path, calls = tmp_path / "results.json", []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        calls.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    monkeypatch.setattr(files.os, "fsync", synced)
    monkeypatch.setattr(files.os, "replace", lambda *names: calls.append("rename") or replace(*names))
    files.write_atomically(path, b"new")
    assert calls == ["file", "rename", "folder"]


def test_orphans_of_the_same_file_are_swept_and_nothing_else(tmp_path):
    path = tmp_path / "model.safetensors"
    left = orphan(path)
    others = [
        orphan(tmp_path / "other"),
        tmp_path / ".model.safetensors.tmp",
        tmp_path / ".semisparse-x.tmp",
        tmp_path / f"{left.name}.bak",
    ]
    for other in others:
        other.write_bytes(b"mine")
    files.write_atomically(path, b"new")
    assert set(tmp_path.iterdir()) == {path, *others}


def test_what_a_living_process_writes_is_never_swept(tmp_path):
    path = tmp_path / "model.safetensors"
    descriptor, temporary = files._create(path)
    files.write_atomically(path, b"from another process")
    assert temporary.exists()
    os.close(descriptor)
    files.write_atomically(path, b"again")
    assert not temporary.exists()


WRITERS = """
import os, sys
from pathlib import Path
from semisparse.files import write_atomically

path, children = Path(sys.argv[1]), []
for letter in b"abc":
    child = os.fork()
    if not child:
        for _ in range(100):
            write_atomically(path, bytes([letter]) * 50_000)
        os._exit(0)
    children.append(child)
while children:
    if path.exists():
        content = path.read_bytes()
        assert len(content) == 50_000 and len(set(content)) == 1
    child, status = os.waitpid(-1, os.WNOHANG)
    if child:
        assert status == 0
        children.remove(child)
"""


def test_writers_of_one_file_do_not_disturb_each_other(tmp_path):
    done = fresh.run("-c", WRITERS, tmp_path / "model.safetensors", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == [tmp_path / "model.safetensors"]


def test_temporary_names_cannot_be_foreseen(tmp_path):
    names = {files._create(tmp_path / "x")[1].name for _ in range(20)}
    assert len(names) == 20 and len({name[-20:] for name in names}) == 20


@pytest.mark.parametrize("kind", ["link", "dangling link", "file", "folder"])
def test_nothing_is_written_through_what_was_planted_under_a_temporary_name(tmp_path, monkeypatch, kind):
    victim, folder = tmp_path / "victim", tmp_path / "out"
    folder.mkdir()
    if kind != "dangling link":
        victim.write_bytes(b"mine")
    path = folder / "model.safetensors"
    monkeypatch.setattr(files.secrets, "token_hex", lambda count: "0" * 16)
    planted = folder / f"{files._stem(path)}{'0' * 16}.tmp"
    if kind == "folder":
        planted.mkdir()
    elif kind == "file":
        planted.hardlink_to(victim)
    else:
        planted.symlink_to(victim)
    if kind == "file":  # an orphan for all that can be seen: its name goes, its content stays
        files.write_atomically(path, b"new")
    else:
        with pytest.raises(FileExistsError):
            files.write_atomically(path, b"new")
        assert planted.is_symlink() or planted.is_dir()
    assert victim.exists() == (kind != "dangling link")
    assert not victim.exists() or victim.read_bytes() == b"mine"


@pytest.mark.parametrize("there", [True, False])
def test_a_link_is_replaced_and_what_it_points_to_stays(tmp_path, there):
    victim, path = tmp_path / "victim", tmp_path / "model.safetensors"
    if there:
        victim.write_bytes(b"mine")
    path.symlink_to(victim)
    files.write_atomically(path, b"new")
    assert path.read_bytes() == b"new" and not path.is_symlink()
    assert victim.exists() is there and (not there or victim.read_bytes() == b"mine")


def test_the_longest_name_and_the_usual_permissions(tmp_path):
    path = tmp_path / ("x" * 255)
    files.write_atomically(path, b"new")
    usual = tmp_path / "usual"
    usual.write_bytes(b"")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(usual.stat().st_mode)
