"""The example of a resumed training refuses a stop that leaves nothing to do before or after it."""

import subprocess
import sys
from pathlib import Path

import pytest

RESUME = Path(__file__).parents[2] / "examples" / "resume.py"


@pytest.mark.parametrize("options", [("--steps", "30"), ("--stop-at", "0"), ("--steps", "30", "--stop-at", "30")])
def test_a_stop_outside_of_the_training_is_refused(options: tuple[str, ...]) -> None:
    command = [sys.executable, str(RESUME), "--device", "cpu", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 2 and "must lie between 0 and --steps" in done.stderr
