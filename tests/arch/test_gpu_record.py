"""The GPU record speaks for the files as they are, or gpu_pending.md says which not, and why."""

import json
import re

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
