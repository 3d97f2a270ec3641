"""The GPU record speaks for the files as they are, or gpu_pending.md says which not, and why."""

import json
import re
from typing import Any

import pytest

from tests import record_gpu
from tests.record_gpu import ROOT, recorded_files

RECORD = ROOT / "tests" / "gpu_record.json"
PENDING = ROOT / "tests" / "gpu_pending.md"


def pending() -> dict[str, str]:
    """File, or folder with a slash at its end, -> reason, from lines such as `- src/semisparse/ops.py: reason`."""
    return dict(re.findall(r"^- (\S+): (.+)$", PENDING.read_text(), flags=re.MULTILINE))


def changed() -> set[str]:
    """Files that are not, or not as they are now, in the record."""
    recorded = json.loads(RECORD.read_text())["files"] if RECORD.exists() else {}
    return {path for path, digest in recorded_files().items() if recorded.get(path) != digest}


def test_every_changed_file_has_a_record_or_a_reason():
    named = tuple(path for path in pending() if path.endswith("/"))
    left = {path for path in changed() - pending().keys() if not path.startswith(named)}
    assert not left, "run `make test-gpu` on a GPU, or name these files in tests/gpu_pending.md"


def test_pending_names_only_existing_files_that_did_change():
    for path in pending():
        assert (ROOT / path).exists()
        stale = not any(name.startswith(path) if path.endswith("/") else name == path for name in changed())
        assert not stale, f"{path} is recorded; take it off tests/gpu_pending.md"


def test_a_record_without_failures():
    if RECORD.exists():
        record = json.loads(RECORD.read_text())
        assert record["passed"] > 0 and record["failed"] == []


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(record_gpu, "recorded_files", lambda: {"a.py": "1", "b.py": "2"})
    return {
        "passed": 7,
        "failed": ["tests/x.py::one", "tests/x.py::two", "tests/x.py::two"],
        "files": record_gpu.recorded_files(),
    }


def test_what_failed_runs_again_and_the_record_says_so(record: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"provenance": {"commit": "abc"}, "seconds": 2.5, "passed": 1, "failed": ["tests/x.py::two"]}
    monkeypatch.setattr(record_gpu, "ran", lambda tests: (1, found, {"tests/x.py::one"}))
    code, together = record_gpu.again(record)
    assert code == 1
    assert together["passed"] == 8 and together["failed"] == ["tests/x.py::two"]
    assert together["again"] == [{"provenance": {"commit": "abc"}, "seconds": 2.5, "tests": record["failed"][:2]}]
    monkeypatch.setattr(record_gpu, "ran", lambda tests: (0, found | {"failed": []}, {"tests/x.py::two"}))
    assert [one["tests"] for one in record_gpu.again(together)[1]["again"]] == [
        record["failed"][:2],
        ["tests/x.py::two"],
    ]


def test_nothing_runs_again_beside_other_files_or_without_a_failure(
    record: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record_gpu, "ran", lambda tests: pytest.fail("ran"))
    with pytest.raises(SystemExit, match=r"other files: b\.py$"):
        record_gpu.again(record | {"files": {"a.py": "1", "b.py": "3"}})
    with pytest.raises(SystemExit, match="nothing failed"):
        record_gpu.again(record | {"failed": []})


def test_a_test_that_is_skipped_instead_has_not_passed(record: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"provenance": {}, "seconds": 2.5, "passed": 1, "failed": []}
    monkeypatch.setattr(record_gpu, "ran", lambda tests: (0, found, {"tests/x.py::one"}))
    with pytest.raises(SystemExit, match=r"skipped, or are gone: tests/x\.py::two$"):
        record_gpu.again(record)
