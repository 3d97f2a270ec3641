"""The GPU record speaks for the files as they are, or gpu_pending.md says which not, and why."""

import json
import re
from pathlib import Path

from tests.record_gpu import ROOT, recorded_files

RECORD = ROOT / "tests" / "gpu_record.json"
PENDING = ROOT / "tests" / "gpu_pending.md"


def pending() -> dict[str, str]:
    """File -> reason, from lines such as `- src/semisparse/ops.py: reason`."""
    return dict(re.findall(r"^- (\S+): (.+)$", PENDING.read_text(), flags=re.MULTILINE))


def test_every_changed_file_has_a_record_or_a_reason():
    recorded = json.loads(RECORD.read_text())["files"] if RECORD.exists() else {}
    changed = {path for path, digest in recorded_files().items() if recorded.get(path) != digest}
    assert changed <= pending().keys(), "run `make test-gpu` on a GPU, or name these files in tests/gpu_pending.md"


def test_pending_names_only_existing_files_that_did_change():
    recorded = json.loads(RECORD.read_text())["files"] if RECORD.exists() else {}
    files = recorded_files()
    for path in pending():
        assert Path(ROOT / path).exists()
        assert files.get(path) != recorded.get(path), f"{path} is recorded; take it off tests/gpu_pending.md"


def test_a_record_without_failures():
    if RECORD.exists():
        record = json.loads(RECORD.read_text())
        assert record["passed"] > 0 and record["failed"] == []
