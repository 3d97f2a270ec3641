"""Run the GPU tests and write tests/gpu_record.json: what was run, on what, and the hash of every file it speaks for.

    python tests/record_gpu.py [DIR [WORKERS]]        (make test-gpu)

WORKERS processes (pytest-xdist) share the GPUs, each of them sees one; tests that measure time, and those that need
several GPUs, run alone afterwards.

CI has no GPU; it compares the hashes with the files (tests/arch/test_gpu_record.py), so a change without a new record
fails there unless tests/gpu_pending.md names the file and why.
"""

import hashlib
import json
import os
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
TWO_GPUS = (
    "tests/gpu/test_gathering.py",
    "tests/gpu/test_two_gpus.py",
    "tests/gemm/test_engine_gpu.py::test_another_device_than_the_current_one",
)
ALONE = ["tests/gemm/test_engine_cost_gpu.py", *TWO_GPUS]
sys.path.insert(0, str(ROOT))


def recorded_files() -> dict[str, str]:
    """Path -> sha256 of each file that a GPU record speaks for."""
    package = ROOT / "src" / "semisparse"
    folders = ("formats", "kernels", "gemm", "native", "ops")
    files = [path for folder in folders for end in ("py", "json") for path in package.glob(f"{folder}/**/*.{end}")]
    files += [path for end in ("cpp", "h") for path in (ROOT / "csrc").glob(f"*.{end}")]
    files += [package / f"{name}.py" for name in ("masks", "operands", "routes", "functional", "autograd")]
    return {str(path.relative_to(ROOT)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)}


class Outcomes:
    """A pytest plugin that counts outcomes and keeps the reasons of skips and the names of failures."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.failed: list[str] = []
        self.skipped: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.counts[report.outcome] += 1
        if report.failed:
            self.failed.append(report.nodeid)
        if report.skipped:
            # (file, line, reason): the file's path is a matter of the machine.
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
            self.skipped.append(f"{report.nodeid}: {reason}")


def main() -> int:
    from benchmarks.store import provenance

    os.environ["SEMISPARSE_TEST_GPUS"] = str(torch.cuda.device_count())
    outcomes, start = Outcomes(), time.monotonic()
    common = ["-m", "gpu", "-q", "--durations=15", "-p", "no:cacheprovider", "-p", "no:benchmark"]
    workers = ["-n", sys.argv[2], "--dist", "worksteal"] if len(sys.argv) > 2 else []
    together = [str(ROOT / "tests"), str(ROOT / "lab" / "tests"), *(f"--deselect={path}" for path in ALONE), *workers]
    code = max(int(pytest.main([*common, *paths], plugins=[outcomes])) for paths in (together, ALONE))
    record = {
        "provenance": provenance(),
        "seconds": round(time.monotonic() - start, 1),
        "passed": outcomes.counts["passed"],
        "failed": outcomes.failed,
        "skipped": outcomes.skipped,
        "files": recorded_files(),
    }
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "tests"
    (folder / "gpu_record.json").write_text(json.dumps(record, indent=1) + "\n")
    return code


if __name__ == "__main__":
    raise SystemExit(main())
