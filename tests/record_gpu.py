"""Run the GPU tests and write tests/gpu_record.json: what was run, on what, and the hash of every file it speaks for.

    python tests/record_gpu.py [DIR [WORKERS]]        (make test-gpu)
    python tests/record_gpu.py DIR --again RECORD

WORKERS processes (pytest-xdist) share the GPUs, each of them sees one; tests that measure time, and those that need
several GPUs, run alone afterwards. --again runs what failed in RECORD after its tests were mended: only while every
file that RECORD speaks for is as it was. The new record says which tests ran again.

CI has no GPU; it compares the hashes with the files (tests/arch/test_gpu_record.py), so a change without a new record
fails there unless tests/gpu_pending.md names the file and why.
"""

import argparse
import hashlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
        self.passed: set[str] = set()
        self.failed: list[str] = []
        self.skipped: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.counts[report.outcome] += 1
        if report.when == "call" and report.passed:
            self.passed.add(report.nodeid)
        if report.failed:
            self.failed.append(report.nodeid)
        if report.skipped:
            # (file, line, reason): the file's path is a matter of the machine.
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
            self.skipped.append(f"{report.nodeid}: {reason}")


def ran(*runs: Sequence[str]) -> tuple[int, dict[str, Any], set[str]]:
    """Run tests, a call of pytest each: its worst exit code, the record of what they found, and which passed."""
    from benchmarks.store import provenance

    outcomes, start = Outcomes(), time.monotonic()
    common = ["-m", "gpu", "-q", "--durations=15", "-p", "no:cacheprovider", "-p", "no:benchmark"]
    code = max(int(pytest.main([*common, *run], plugins=[outcomes])) for run in runs)
    record = {
        "provenance": provenance(),
        "seconds": round(time.monotonic() - start, 1),
        "passed": outcomes.counts["passed"],
        "failed": outcomes.failed,
        "skipped": outcomes.skipped,
        "files": recorded_files(),
    }
    return code, record, outcomes.passed - set(outcomes.failed)


def again(before: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """Run what failed once more: the exit code, and the record of both runs together.

    Args:
        before: A record.

    Raises:
        SystemExit: It speaks for other files, or nothing failed in it.
    """
    if before["files"] != (files := recorded_files()):
        changed = sorted({path for path, _ in before["files"].items() ^ files.items()})
        raise SystemExit(f"run all tests: the record is of other files: {', '.join(changed)}")
    if not before["failed"]:
        raise SystemExit("nothing failed in this record")
    tests = list(dict.fromkeys(before["failed"]))  # one that fails in its call and in its teardown is there twice
    code, found, passed = ran(tests)
    if unknown := [one for one in tests if one not in passed and one not in found["failed"]]:
        raise SystemExit(f"run all tests: of those that failed these were skipped, or are gone: {', '.join(unknown)}")
    more = {"provenance": found["provenance"], "seconds": found["seconds"], "tests": tests}
    together = before | {"passed": before["passed"] + len(passed), "failed": found["failed"]}
    return code, together | {"again": [*before.get("again", []), more]}


def main() -> int:
    """Run and write the record; the exit code is pytest's."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", nargs="?", type=Path, default=ROOT / "tests", metavar="DIR")
    options.add_argument("workers", nargs="?", metavar="WORKERS")
    options.add_argument("--again", type=Path, metavar="RECORD")
    given = options.parse_args()
    os.environ["SEMISPARSE_TEST_GPUS"] = str(torch.cuda.device_count())
    if given.again:
        code, record = again(json.loads(given.again.read_text()))
    else:
        workers = ["-n", given.workers, "--dist", "worksteal"] if given.workers else []
        together = [str(ROOT / folder) for folder in ("tests", "lab/tests")]
        code, record, _ = ran([*together, *(f"--deselect={path}" for path in ALONE), *workers], ALONE)
    (given.folder / "gpu_record.json").write_text(json.dumps(record, indent=1) + "\n")
    return code


if __name__ == "__main__":
    raise SystemExit(main())
