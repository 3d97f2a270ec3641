"""Sequences of what users do to a model: those of tests/random_use, as many as at night, with a seed of the hour."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

from tests.faults.fault import Fault

ROOT = Path(__file__).resolve().parents[2]
NIGHTLY = 2000
KINDS = {"compiled": "with compiled steps", "recipe": "recipes", "packed": "schedules", "exported": "exports"}
"""What hypothesis tells by the first word of an event, and how the table names it."""


def sequences(count: int, folder: Path) -> dict[str, int]:
    """Run them in a process of their own, and take the number from what hypothesis says."""
    seed = int(time.time())
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--hypothesis-show-statistics",
               f"--hypothesis-seed={seed}", "tests/random_use"]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if name != "CI"} | {"SEMISPARSE_EVERY_CASE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        print(done.stdout + done.stderr, file=sys.stderr)
    said = re.search(r"(\d+) passing, (\d+) failing, and (\d+) invalid", done.stdout)
    assert done.returncode == 0 and said is not None, f"seed {seed}: a sequence failed"
    assert int(said[1]) >= count, f"{said[1]} sequences ran, of {count}"
    drawn = dict.fromkeys(KINDS, 0)
    for share, event in re.findall(r"([\d.]+)%, (\w+)", done.stdout):
        if event in drawn:
            drawn[event] += round(float(share) / 100 * sum(map(int, said.groups())))
    assert all(drawn.values()), f"seed {seed}: something was not drawn: {drawn}"
    return {"sequences that fail": int(said[2])} | {KINDS[event]: number for event, number in drawn.items()}


FAULTS = [
    Fault("random use of a model (tests/random_use)", "", "each step within the bounds of accuracy of a brute force", 0,
          NIGHTLY, sequences, "sequences")
]  # fmt: skip
