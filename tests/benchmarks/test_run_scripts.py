"""The scripts of benchmarks/runs: their syntax, and the parts that they share, without a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

RUNS = Path(__file__).resolve().parents[2] / "benchmarks" / "runs"


def bash(script: str, out: Path) -> list[str]:
    """Lines that a script prints after common.sh, whose first argument is out."""
    done = subprocess.run(
        ["bash", "-c", f'source "{RUNS}/common.sh"\n{script}', "script", str(out)],
        capture_output=True, text=True, timeout=60, env=os.environ | {"PYTHON": sys.executable, "GPUS": "0"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("path", sorted(RUNS.glob("*.sh")), ids=lambda path: path.name)
def test_a_script_is_valid_and_says_what_it_writes_and_how_long_it_takes(path: Path) -> None:
    subprocess.run(["bash", "-n", path], check=True)
    head = path.read_text().split("\nsource ")[0]
    if not head.startswith("# Sourced"):
        assert "OUT" in head and "minute" in head


def test_a_step_that_fails_or_takes_too_long_is_said_with_its_last_lines_and_the_next_one_runs(tmp_path: Path) -> None:
    script = 'step 9 wrong bash -c "echo why; exit 3"\nstep 1 slow sleep 9\nstep 9 right echo done'
    wrong, why, slow, right = bash(script, tmp_path)
    assert "wrong: exit 3" in wrong and why == "why" and "slow: exit 124" in slow and "right: exit 0" in right
    assert (tmp_path / "right.log").read_text() == "done\n"


def test_lines_of_a_queue_run_once_each_in_their_order_and_know_what_time_is_left(tmp_path: Path) -> None:
    lines = bash('for one in a b c; do echo "$one echo $one \\$LEFT"; done | queue 50', tmp_path)
    assert [line.split()[2] for line in lines] == ["a:", "b:", "c:"]
    name, left = (tmp_path / "b.log").read_text().split()
    assert name == "b" and 0 < int(left) <= 50


def test_a_queue_whose_time_is_up_starts_nothing_more(tmp_path: Path) -> None:
    lines = bash('for one in a b; do echo "$one sleep 5"; done | queue 2', tmp_path)
    assert len(lines) == 1 and "a: exit 124" in lines[0]
    assert not (tmp_path / "b.log").exists()


@pytest.mark.parametrize("gpus", [2, 4])
def test_gpus_share_a_queue_and_the_cores(gpus: int, tmp_path: Path) -> None:
    names = "abcdefgh"[: 2 * gpus]
    lines = f'for one in {" ".join(names)}; do echo "$one echo \\$CUDA_VISIBLE_DEVICES; sleep 1"; done | queue 50'
    assert len(bash(f"GPUS={gpus}\n{lines}", tmp_path)) == len(names)
    used = [(tmp_path / f"{one}.log").read_text().strip() for one in names]
    assert sorted(used) == sorted(2 * [str(gpu) for gpu in range(gpus)])


@pytest.mark.parametrize(
    ("gpus", "used"), [(0, ["", "", ""]), (2, ["", "", ""]), (4, ["0,1", "2,3", "0,1"]), (8, ["0,1", "2,3", "4,5"])]
)
def test_streams_of_two_gpus_use_pairs_and_what_is_left_over_follows(
    gpus: int, used: list[str], tmp_path: Path
) -> None:
    functions = " ".join(f'{one}() {{ step 9 {one} bash -c "echo \\$CUDA_VISIBLE_DEVICES"; }};' for one in "abc")
    bash(f"GPUS={gpus}\n{functions}\nunset CUDA_VISIBLE_DEVICES\nWIDTH=2 streams a b c", tmp_path)
    assert [(tmp_path / f"{one}.log").read_text().strip() for one in "abc"] == used
