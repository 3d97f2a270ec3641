"""The scripts of benchmarks/runs: their syntax, and the parts that they share, without a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from semisparse_lab.studies import llama_linux

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


def test_a_queue_whose_time_is_up_starts_nothing_more_and_names_what_is_left(tmp_path: Path) -> None:
    script = 'for one in a b c; do echo "$one sleep 5"; done | queue 2 || echo "ended with $?"'
    ran, left, code = bash(script, tmp_path)
    assert "a: exit 124" in ran and left.split(": ")[1].split() == ["b", "c"] and code == "ended with 1"
    assert not (tmp_path / "b.log").exists()


def test_a_queue_in_which_a_command_fails_goes_on_and_says_so_in_its_exit_code(tmp_path: Path) -> None:
    lines = bash('printf "a exit 3\\nb true\\n" | queue 50 || echo "ended with $?"', tmp_path)
    assert [line.split()[2:5] for line in lines[:2]] == [["a:", "exit", "3"], ["b:", "exit", "0"]]
    assert lines[2:] == ["ended with 1"]


def fresh(out: Path, *names: str) -> subprocess.CompletedProcess[str]:
    """What benchmarks/runs/fresh.sh does with a Python that only prints its arguments."""
    return subprocess.run(
        ["bash", str(RUNS / "fresh.sh"), str(out), *names],
        capture_output=True, text=True, timeout=60, env=os.environ | {"PYTHON": "echo", "GPUS": "0"},
    )  # fmt: skip


def test_named_benchmarks_run_in_processes_of_their_own_and_a_wrong_name_is_an_error(tmp_path: Path) -> None:
    done = fresh(tmp_path, "llama", "float8-llama*", "small-4096,768,*")
    ran = ["float8-llama-4096", "float8-llama", "llama", "small-4096,768,768", "small-4096,768,3072"]
    assert [line.split()[2].rstrip(":") for line in done.stdout.splitlines()] == ran and done.returncode == 0
    assert f"--rows float8 fp8 --card llama-4096 --save {tmp_path}" in (tmp_path / "float8-llama-4096.log").read_text()
    wrong = fresh(tmp_path, "llama", "lama")
    assert (wrong.returncode, wrong.stdout, wrong.stderr) == (2, "", "nothing is named lama\n")


def test_without_names_every_benchmark_runs_once(tmp_path: Path) -> None:
    names = [line.split()[2] for line in fresh(tmp_path).stdout.splitlines()]
    assert len(names) == len(set(names)) > 30


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


def study(out: Path, **variables: str) -> tuple[list[str], dict[str, dict[str, str]]]:
    """The runs of a study that the script would start, in order, and the options of each."""
    given = {"PYTHON": "echo", "GPUS": "0", "TOKENS": "text", "LR": "2e-4", **variables}
    done = subprocess.run(
        ["bash", RUNS / "llama_linux.sh", out, "study"],
        capture_output=True, text=True, timeout=60, env=os.environ | given, check=True,
    )  # fmt: skip
    names = [line.split()[2].removesuffix(":") for line in done.stdout.splitlines()]
    options = {}
    for name in names:
        words = (out / f"{name}.log").read_text().split()
        places = [place for place, word in enumerate(words) if word.startswith("--")]
        options[name] = {words[place].removeprefix("--"): words[place + 1] for place in places}
    return names, options


def test_each_run_of_a_study_changes_one_setting_and_folders_hold_one_set_of_settings(tmp_path: Path) -> None:
    names, options = study(tmp_path, STEPS="200")
    assert names[0] == "study-repeat-fp8-24" and len(set(names)) == len(names) >= 12
    assert names.index("study-hold-0-bf16") < names.index("study-hold-0-fp8-24")  # the reference comes first
    folders: dict[str, set[str]] = {}
    base = {slug: arm.recipe for slug, arm in ((arm.slug, arm) for arm in llama_linux.arms())}
    for name in names:
        given = {word.replace("-", "_"): value for word, value in options[name].items()}
        shared = {word: given.pop(word) for word in ("data_dir", "minutes", "out", "arms", "seeds", "steps", "lr")}
        assert (shared["steps"], shared["lr"], shared["seeds"], shared["arms"] in base) == ("200", "2e-4", "0", True)
        if name == names[0]:
            assert not given  # another run of the main arm, which shows how much runs differ
            continue
        ((setting, value),) = given.items()
        typed = value if setting == "layers" else float(value) if "." in value else int(value)
        chosen = llama_linux.settings("cpu", small=True, **{setting: typed})
        assert chosen != llama_linux.settings("cpu", small=True)
        folders.setdefault(shared["out"], set()).add(f"{setting}={value}")
        assert f"study-{Path(shared['out']).name.removeprefix('study-')}-{shared['arms']}" == name
    assert all(len(settings) == 1 for settings in folders.values())
    assert len(set.union(*folders.values())) == len(folders)


def test_a_study_skips_what_is_there_and_starts_nothing_that_has_no_time(tmp_path: Path) -> None:
    (tmp_path / "study-share-0.5").mkdir()
    (tmp_path / "study-share-0.5" / "llama-linux.fp8-24.tokens.seed3.json").touch()
    left = {"STUDY": "share-0.5:fp8-24 hold-0:bf16", "SEED": "3"}
    names, options = study(tmp_path, **left)
    assert names == ["study-hold-0-bf16"] and options["study-hold-0-bf16"]["seeds"] == "3"
    assert study(tmp_path, **left, NEEDS="9999")[1] == {"study-hold-0-bf16": {}}
    assert "too few" in (tmp_path / "study-hold-0-bf16.log").read_text()
