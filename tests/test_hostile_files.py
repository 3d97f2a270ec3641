"""Hostile files: whatever reads a file of others runs nothing, writes nothing elsewhere, and raises a typed error."""

import json
import os
import pickle
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import semisparse
from semisparse.errors import SemiSparseError
from semisparse.gemm.autotune.store import Store
from semisparse.planning.store import PlanStore
from semisparse.selfcheck import files as selfchecks
from tests.cli.shell import semisparse as shell

_seen: list[str] | None = None
"""What the process does to the world while it is watched."""

_DONE = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "pickle.find_class", "ctypes.dlopen",
         "os.remove", "os.rename", "os.mkdir", "os.symlink", "os.link", "os.chmod", "socket.connect")  # fmt: skip
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def _hear(event: str, arguments: tuple[Any, ...]) -> None:
    if _seen is None:
        return
    if event in _DONE or (event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITES):
        _seen.append(f"{event} {arguments[:2]}")
    elif event == "import" and str(arguments[0]).startswith("hostile"):
        _seen.append(f"import {arguments[0]}")


sys.addaudithook(_hear)


@contextmanager
def watched() -> Iterator[list[str]]:
    """What happens inside the block."""
    global _seen
    _seen = found = []
    try:
        yield found
    finally:
        _seen = None


class Payload:
    """Unpickled, it makes a folder where the test looks."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.marker),)


def header(fields: Any, length: int | None = None, data: bytes = b"") -> bytes:
    """A safetensors file with this header, which may say another length."""
    text = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape: Any = (4, 4), offsets: Any = (0, 64), dtype: Any = "F32") -> dict[str, Any]:
    return {"w": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


JSON = {
    "nothing": b"",
    "half": b'{"schema": 1, "kind":',
    "deep": b'{"schema": ' + b"[" * 50_000,
    "no text": b"\xff\xfe\x00\x01",
    "NaN": b'{"schema": NaN, "kind": "bench"}',
    "huge": b'{"schema": 3, "kind": "bench", "mode": "eager", "predicted_ms": ' + b"9" * 4000 + b"}",
    "more digits than Python converts": b'{"schema": ' + b"9" * 6000 + b"}",
    "a list": b"[1]",
    "null": b"null",
    "a name to import": b'{"schema": "hostile.module", "_target_": "os.system", "mode": "hostile.run"}',
    "a class": b'{"py/object": "os.system", "schema": 3, "mode": "eager"}',
}

TENSORS = {
    "nothing": b"",
    "no header": b"\x00" * 7,
    "a header of exabytes": header(b"{}", 2**62),
    "a header longer than the file": header(b"{}", 1000),
    "a negative header": header(b"{}", 2**64 - 1),
    "no JSON": header(b"\xff" * 32),
    "deep": header(b"[" * 50_000),
    "offsets behind the end": header(entry(offsets=(0, 2**40))),
    "offsets that overlap": header({"a": entry()["w"], "b": entry(offsets=(32, 96))["w"]}, data=bytes(96)),
    "offsets backwards": header(entry(offsets=(64, 0)), data=bytes(64)),
    "sizes that overflow": header(entry(shape=(2**33, 2**33)), data=bytes(64)),
    "a negative size": header(entry(shape=(-4, -4)), data=bytes(64)),
    "an unknown dtype": header(entry(dtype="hostile.dtype"), data=bytes(64)),
    "a truncated tensor": header(entry(), data=bytes(10)),
    "NaN as a size": header(b'{"w": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 4]}}', data=bytes(4)),
}


def archive(path: Path) -> None:
    """What torch.load would read: a zip with a pickle, whose other member unpacks to 64 MB."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", pickle.dumps(Payload(path.parent / "executed")))
        file.writestr("archive/data/0", bytes(64 << 20))


READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "plan": ("file.json", lambda path: semisparse.Plan.load(path)),
    "self-check": ("file.json", selfchecks.read),
    "index of shards": ("m.safetensors.index.json", semisparse.check_checkpoint),
    "checkpoint": ("file.safetensors", semisparse.check_checkpoint),
}


def refused(name: str, read: Callable[[Path], object], path: Path) -> None:
    with watched() as seen, pytest.raises(SemiSparseError, match=r".") as error:
        read(path)
    assert len(str(error.value)) < 5000 and str(error.value).splitlines()[0].isprintable()
    assert seen == [], name
    assert not (path.parent / "executed").exists()


@pytest.mark.parametrize("name", READERS)
def test_hostile_json_is_refused(name: str, tmp_path: Path) -> None:
    file, read = READERS[name]
    for content in JSON.values():
        (tmp_path / file).write_bytes(content)
        refused(name, read, tmp_path / file)


def test_hostile_headers_are_refused(tmp_path: Path) -> None:
    for name, content in TENSORS.items():
        (tmp_path / "file.safetensors").write_bytes(content)
        refused(name, semisparse.check_checkpoint, tmp_path / "file.safetensors")


@pytest.mark.parametrize("name", READERS)
def test_pickles_and_archives_under_another_name_are_refused_and_not_run(name: str, tmp_path: Path) -> None:
    file, read = READERS[name]
    path = tmp_path / file
    path.write_bytes(pickle.dumps(Payload(tmp_path / "executed")))
    refused(name, read, path)
    archive(path)
    refused(name, read, path)


@pytest.mark.parametrize("ending", [".pt", ".bin", ".pkl", ".zip"])
def test_files_that_could_hold_code_are_not_opened(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"model{ending}"
    path.write_bytes(pickle.dumps(Payload(tmp_path / "executed")))
    refused(ending, semisparse.check_checkpoint, path)


@pytest.mark.parametrize("name", READERS)
def test_pipes_devices_and_dangling_links_are_refused_without_waiting(name: str, tmp_path: Path) -> None:
    file, read = READERS[name]
    path = tmp_path / file
    os.mkfifo(path)
    refused(name, read, path)
    for target in ("/dev/zero", "/nowhere", str(path)):
        path.unlink()
        path.symlink_to(target)
        refused(name, read, path)


def test_what_lies_in_the_caches_is_ignored_and_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    key, choices, plans = {"gpu": "x"}, Store(tmp_path), PlanStore(tmp_path)
    files = (choices._path(dict(key)), plans._path(key))
    contents = [*JSON.values(), pickle.dumps(Payload(tmp_path / "executed"))]
    for content in contents:
        for path in files:
            path.write_bytes(content)
        with watched() as seen:
            assert choices.load(dict(key)) is None and plans.load(key) is None
        assert seen == []
    assert len(caplog.records) == 2 * len(contents) and not (tmp_path / "executed").exists()


def test_the_command_line_shows_hostile_files_as_one_line_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for content in (JSON["deep"], JSON["huge"], pickle.dumps(Payload(tmp_path / "executed"))):
        for command in (("bench", "--show", "file.json"), ("check", "file.safetensors")):
            Path(command[-1]).write_bytes(content)
            with watched() as seen:
                outcome = shell(*command)
            assert outcome.code == 2 and len(outcome.err.splitlines()) == 1 and outcome.err.strip().isprintable()
            assert seen == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file.json", "file.safetensors"]


def test_a_library_in_the_working_directory_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from semisparse.native import loading

    for name in ("launch.so", "libcusparseLt.so.0"):
        (tmp_path / name).write_bytes(b"hostile")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    assert loading.LIBRARY.is_absolute()
    assert loading.LIBRARY.parent == Path(semisparse.__file__).parent / "native"
    monkeypatch.setattr(loading, "LIBRARY", loading.LIBRARY.with_name("not-there.so"))
    with watched() as seen:
        found, reason = loading._load.__wrapped__()
    assert (found, seen) == (None, []) and "not built" in reason
