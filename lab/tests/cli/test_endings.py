"""How commands end: flags in messages, a version, runs that diverged, ctrl-C."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import semisparse_lab as package
from lab.tests.cli.shell import TINY, semisparse_lab
from lab.tests.rewriting import with_info
from semisparse_lab.cli.main import run
from semisparse_lab.studies.three_runs import FILES

PROGRAM = [sys.executable, "-m", "semisparse_lab"]


def test_the_version_is_printed() -> None:
    outcome = semisparse_lab("--version")
    assert (outcome.code, outcome.out, outcome.err) == (0, f"semisparse-lab {package.__version__}\n", "")
    assert "--version" in semisparse_lab("--help").out


HUGE = {
    "--seed": [2**64, -1, 10**30],
    "--epochs": [0, -1, 10**12, 10**400],
    "--batch-size": [0, -5, 10**18, 10**400],
    "--lr": ["nan", "inf", "-inf", 0, -1, "1e400", "1e308"],
    "--sparse-fraction": ["nan", "inf", -1, 0, 1, 2, "1e-300"],
    "--layers": ["", "[", "*.nothing", "x" * 5000],
}


@pytest.mark.parametrize(
    ("flag", "value"), [(flag, value) for flag in HUGE for value in HUGE[flag]], ids=lambda value: str(value)[:12]
)
def test_a_value_out_of_range_is_named_by_its_flag_at_once(flag: str, value: object, tmp_path: Path) -> None:
    outcome = semisparse_lab("train", *TINY, "--out", tmp_path / "out", f"{flag}={value}")
    assert (outcome.code, outcome.out) == (2, "")
    assert re.fullmatch(rf"error: {flag}=.*\n", outcome.err), outcome.err
    assert "Traceback" not in outcome.err
    assert not (tmp_path / "out").exists()


def test_the_largest_seed_is_taken(tmp_path: Path) -> None:
    assert semisparse_lab("train", *TINY, "--seed", 2**64 - 1, "--out", tmp_path / "out").code == 0
    assert json.loads((tmp_path / "out" / "results.json").read_text())["runs"][0]["seed"] == 2**64 - 1


@pytest.fixture(scope="module")
def diverged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, object]:
    folder = tmp_path_factory.mktemp("diverged")
    return folder, semisparse_lab("train", *TINY, "--lr", "1e30", "--out", folder)


def test_a_run_that_diverges_is_no_ordinary_end(diverged) -> None:
    folder, outcome = diverged
    assert outcome.code == 3
    assert outcome.err == (
        "error: dense, sparse then dense (70 %), fully sparse diverged: a loss was not finite, so the scores mean "
        "nothing; try a lower learning rate or more precision\n"
    )
    rows = [[cell.strip() for cell in line.split("│")[1:3]] for line in outcome.out.splitlines() if line[:1] == "│"]
    assert [row[1] for row in rows] == ["diverged"] * 3
    document = json.loads((folder / "results.json").read_text())
    assert [run["value"] for run in document["runs"]] == [None] * 3 and document["finished"]
    assert {path.name for path in folder.iterdir()} == set(FILES)


def test_a_diverged_checkpoint_has_no_ordinary_score(diverged) -> None:
    outcome = semisparse_lab("evaluate", diverged[0] / "dense.safetensors", "--device", "cpu")
    assert outcome.code == 3 and "dense.safetensors diverged" in outcome.err


def interrupt(folder: Path, *options: object, when) -> subprocess.CompletedProcess[str]:
    """Train for long, and press ctrl-C when when() says so."""
    command = [*PROGRAM, "train", "--device", "cpu", "--batch-size", "128", "--out", folder, *options]
    process = subprocess.Popen(
        [str(word) for word in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    while not when():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def test_ctrl_c_in_the_first_run_says_that_nothing_was_written(tmp_path: Path) -> None:
    out = tmp_path / "out"
    ended = interrupt(out, "--epochs", 10_000, when=out.exists)
    assert ended.returncode == 130
    assert ended.stderr == "interrupted: nothing was written, no file was changed\n"
    assert list(out.iterdir()) == []


def test_ctrl_c_after_the_first_run_says_what_is_kept_and_it_is_there(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "fully-sparse.safetensors").write_text("old")
    ended = interrupt(tmp_path, "--epochs", 25, "--force", when=(tmp_path / "curves.png").exists)
    assert ended.returncode == 130
    files = "dense.safetensors, results.json, curves.png"
    assert ended.stderr == f"interrupted: kept {files} in {tmp_path}; no other file was changed\n"
    document = json.loads((tmp_path / "results.json").read_text())
    assert [run["row_title"] for run in document["runs"]] == ["dense"] and document["finished"] is False
    assert semisparse_lab("evaluate", tmp_path / "dense.safetensors", "--device", "cpu").code == 0
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert (tmp_path / "fully-sparse.safetensors").read_text() == "old"


def test_ctrl_c_in_evaluate(monkeypatch: pytest.MonkeyPatch) -> None:
    def pressed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("semisparse_lab.checkpoint.evaluation.evaluate_checkpoint", pressed)
    outcome = semisparse_lab("evaluate", "x.safetensors")
    assert (outcome.code, outcome.out) == (130, "")
    assert outcome.err == "interrupted: nothing was written, no file was changed\n"


def test_ctrl_c_before_any_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def pressed() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("semisparse_lab.cli.main.build_app", pressed)
    with pytest.raises(SystemExit) as ended:
        run()
    assert ended.value.code == 130
    assert capsys.readouterr().err.startswith("interrupted: nothing was written")


@pytest.mark.parametrize("fault", [("--layers", "mpl"), ("--epochs", "0"), ("--data-dir", "somewhere"), ("--lr", "nan"),
                                   ("--batch-size", "5000"), ("--sparse-fraction", "1e-9")])  # fmt: skip
def test_force_deletes_nothing_where_a_check_fails(fault, tmp_path: Path) -> None:
    for name in (*FILES, "notes.txt"):
        (tmp_path / name).write_text(f"old {name}")
    assert semisparse_lab("train", *TINY, "--out", tmp_path, "--force", *fault).code == 2
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        name: f"old {name}" for name in (*FILES, "notes.txt")
    }


@pytest.mark.parametrize("info", [{"test_accuracy": "0.5"}, {"test_accuracy": 10**400}, {"precision": [1]}])
def test_a_mistyped_description_has_no_traceback(info: dict, diverged, tmp_path: Path) -> None:
    path = tmp_path / "dense.safetensors"
    path.write_bytes((diverged[0] / path.name).read_bytes())
    with_info(path, **info)
    outcome = semisparse_lab("evaluate", path, "--device", "cpu")
    assert (outcome.code, outcome.out) == (2, "") and len(outcome.err) < 600


@pytest.mark.parametrize("options", [("--out", "x" * 5000), ("--data", "fashion-mnist", "--data-dir", "x" * 5000)])
def test_names_that_are_too_long_are_named_by_their_flag(options: tuple[str, ...], tmp_path: Path) -> None:
    outcome = semisparse_lab("train", *TINY, "--out", tmp_path / "out", *options)
    assert outcome.code == 2
    assert re.fullmatch(rf"error: {options[-2]}='x.*: File name too long\n", outcome.err)


def test_an_output_that_takes_no_more_text_has_no_traceback_and_says_what_stays(tmp_path: Path) -> None:
    command = [*PROGRAM, "train", *TINY, "--out", tmp_path / "out"]
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(
            [str(word) for word in command], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert ended.returncode == 1
    assert ended.stderr == (
        "error: the output cannot be written: No space left on device; nothing was written, no file was changed\n"
    )
