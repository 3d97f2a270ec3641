"""Trainings that are killed and resumed: other bits, a rest of a save and an error are faults."""

import sys
from pathlib import Path

import pytest

from tests.trust import resumed
from tests.trust.outcome import Row

TRAIN = """
import os, pathlib, sys, time
state = pathlib.Path(sys.argv[1]) / "state.pt"
done = int(state.read_text()) if state.exists() else 0
{begin}
for number in range(done, 60):
    time.sleep(0.004)
    state.with_suffix(".new").write_text(str(number + 1))
    os.replace(state.with_suffix(".new"), state)
    print(number, flush=True)
print("end", state.read_text(), {bits}, flush=True)
{end}
"""
FAULTS = {
    "after 1 kills": {"begin": "resumed = done > 0", "bits": "resumed"},
    "leaves ['state.pt', 'state.tmp']": {"end": "state.with_suffix('.tmp').write_text('')"},
    "exit code 1": {"begin": "assert not done"},
}


def trained(folder: Path, given: dict[str, str]) -> list[Row]:
    program = TRAIN.format(**{"begin": "", "bits": "0", "end": ""} | given)
    tried = resumed.Trainings(folder, lambda at: [sys.executable, "-S", "-c", program, str(at)], each=1)
    tried.run(lambda: 0.0)
    return tried.rows(10.0)


def test_a_training_that_resumes_with_the_same_bits_passes(tmp_path: Path) -> None:
    rows = trained(tmp_path, {})
    assert all(row.passed for row in rows) and [row.figure for row in rows] == [1, 1, 0]


@pytest.mark.parametrize("fault", FAULTS)
def test_what_a_killed_training_leaves_is_looked_at(fault: str, tmp_path: Path) -> None:
    last = trained(tmp_path, FAULTS[fault])[-1]
    assert not last.passed and fault in " ".join(last.faults)
