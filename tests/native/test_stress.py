"""What is prepared, under many threads and sanitizers: csrc/tests/stress.cpp, which needs no torch."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.native.building import program, sanitized

SECONDS = 2
SANITIZERS = (("thread",), ("address", "undefined"))


@pytest.fixture(params=SANITIZERS, ids=" and ".join)
def stress(request: pytest.FixtureRequest) -> Path:
    return program("stress.cpp", sanitized(*request.param))


def run(stress: Path, *defect: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [stress, str(SECONDS), *defect], capture_output=True, text=True, timeout=120, check=False,
        env=os.environ | {"TSAN_OPTIONS": "halt_on_error=1"},
    )  # fmt: skip


def test_no_plan_is_used_after_its_drop_and_no_sanitizer_reports_anything(stress: Path) -> None:
    done = run(stress)
    assert (done.returncode, done.stderr) == (0, "")
    count, _, word = done.stdout.strip().partition(" ")
    assert (int(count) > 100, word) == (True, "products")


@pytest.mark.parametrize(
    ("defect", "message"),
    [("free-early", "uses of a plan that was dropped"), ("share-keys", "keys are shared by different calls")],
)
def test_a_planted_defect_is_found(stress: Path, defect: str, message: str) -> None:
    done = run(stress, defect)
    assert done.returncode == 1
    assert message in done.stderr
