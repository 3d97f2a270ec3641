"""Self-checks on disk: what was written comes back, and what is damaged or hostile is refused."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from semisparse.documents import without_checksum
from semisparse.errors import BenchError
from semisparse.selfcheck import files
from semisparse.selfcheck.contents import Check
from tests.selfcheck.reports import report


@pytest.fixture
def path(tmp_path: Path) -> Path:
    files.write(tmp_path / "bench.json", report())
    return tmp_path / "bench.json"


def test_what_was_written_comes_back(path: Path) -> None:
    assert files.read(path) == report()
    assert path.stat().st_size < files.LARGEST / 50
    assert os.listdir(path.parent) == ["bench.json"]


def test_a_failed_write_leaves_the_file_as_it_was_and_says_what_failed(path: Path) -> None:
    before = path.read_bytes()
    broken = report()
    broken.checks.append(Check("x", "fail", float("nan"), 0.0))
    with pytest.raises(ValueError):
        files.write(path, broken)
    assert path.read_bytes() == before and os.listdir(path.parent) == ["bench.json"]
    with pytest.raises(BenchError, match="cannot be written: No such file"):
        files.write(path.parent / "missing" / "bench.json", report())


ESCAPE = "\x1b]0;title\x07"


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "plan"},
        {"schema": 2},
        {"schema": True},
        {"started": "yesterday"},
        {"quick": 1},
        {"budget": -1},
        {"budget": 1e999},
        {"device": "tpu"},
        {"facts": {"torch": ESCAPE}},
        {"facts": {"torch": "x" * 2000}},
        {"facts": {str(number): "" for number in range(2000)}},
        {"facts": []},
        {"capabilities": [["a", "b"]]},
        {"gpu": {}},
        {"parts": [{"name": "numerics", "outcome": "fine", "seconds": 1, "reason": ""}]},
        {"parts": [{}] * 2000},
        {"checks": 3},
        {"layouts": [{"dtype": "bfloat16", "outcome": "verified", "packer": "", "bits": [-1], "reason": ""}]},
        {"layers": [{}]},
        {"choices": [{"key": {"rows": []}, "source": "tuned", "choice": {}}]},
        {"choices": [{"key": {}, "source": "mine", "choice": {}}]},
        {"model": {"title": "", "mode": "fast", "why_eager": "", "ms": {}, "dropped": {}}},
        {"model": {"title": "", "mode": "eager", "why_eager": "", "ms": {"dense": 0}, "dropped": {}}},
    ],
    ids=lambda change: str(change)[:40],
)
def test_a_damaged_file_is_refused(path: Path, change: dict[str, Any]) -> None:
    path.write_text(json.dumps(without_checksum(json.loads(path.read_text())) | change))
    with pytest.raises(BenchError, match="is no self-check that can be used") as caught:
        files.read(path)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("gpu", "name"), ESCAPE),
        (("gpu", "capability"), [9]),
        (("gpu", "memory_bytes"), 10**400),
        (("gpu", "power_limit_watts"), 10**400),
        (("checks", 0, "error"), "small"),
        (("checks", 0, "error"), 3.0),
        (("checks", 0, "outcome"), "perfect"),
        (("layers", 0, "times", "dense", "ms"), 0),
        (("layers", 0, "times", "dense", "device_ms"), 10**400),
        (("layers", 0, "times", "dense", "more"), 1),
        (("layers", 0, "problem", "tokens"), -1),
        (("layers", 0, "dropped"), {"2:4": ESCAPE}),
        (("choices", 0, "choice", "algorithm"), 5),
        (("choices", 0, "choice", "sparse_us"), 10**400),
        (("model", "title"), None),
    ],
    ids=str,
)
def test_a_damaged_field_is_refused(path: Path, where: tuple[Any, ...], value: Any) -> None:
    content = without_checksum(json.loads(path.read_text()))
    inside = content
    for step in where[:-1]:
        inside = inside[step]
    inside[where[-1]] = value
    path.write_text(json.dumps(content))
    with pytest.raises(BenchError, match="is no self-check that can be used"):
        files.read(path)


@pytest.mark.parametrize("field", ["kind", "schema", "gpu", "parts", "checks", "layers", "choices", "model"])
def test_a_missing_field_is_refused(path: Path, field: str) -> None:
    content = without_checksum(json.loads(path.read_text()))
    del content[field]
    path.write_text(json.dumps(content))
    with pytest.raises(BenchError):
        files.read(path)


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "3", "\ufeff{}", "[" * 100_000, "\x00", '"\\ud800"'])
def test_what_is_no_document_is_refused(path: Path, text: str) -> None:
    path.write_text(text)
    with pytest.raises(BenchError):
        files.read(path)


def test_what_is_no_file_or_too_large_is_refused(path: Path) -> None:
    with pytest.raises(BenchError, match="cannot be read: No such file"):
        files.read(path.parent / "other.json")
    with pytest.raises(BenchError, match="not a regular file"):
        files.read(path.parent)
    os.mkfifo(path.parent / "pipe")
    with pytest.raises(BenchError, match="not a regular file"):
        files.read(path.parent / "pipe")
    with path.open("ab") as file:
        file.truncate(files.LARGEST + 1)
    with pytest.raises(BenchError, match="more than"):
        files.read(path)
    path.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(BenchError):
        files.read(path)
