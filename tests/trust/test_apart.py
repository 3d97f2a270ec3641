"""A part in a process of its own: what it wrote is kept, however it ends, and no process is left."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.trust import __main__ as program
from tests.trust import apart

WRITE = """
import json, os, sys, time
part = {"name": "soak", "outcome": sys.argv[2], "reason": "", "rows": [{"figure": 1, "passed": True}]}
open(sys.argv[1], "w").write(json.dumps({"parts": [part]}))
"""
BEGUN = {"name": "soak", "outcome": "running", "reason": "", "rows": []}


def run(file: Path, more: str, outcome: str = "running", seconds: float = 60.0) -> tuple[apart.Document, list[str]]:
    seen: list[str] = []
    command = [sys.executable, "-c", WRITE + more, str(file), outcome]
    return apart.run(command, file, BEGUN, seconds, lambda part: seen.append(part["outcome"])), seen


def test_a_part_that_ends_is_taken_as_it_is(tmp_path: Path) -> None:
    part, seen = run(tmp_path / "x.json", "time.sleep(1.5)", "done")
    assert part["outcome"] == "done" and part["rows"] and seen == ["done"]


@pytest.mark.parametrize(("more", "reason"), [("os.abort()", "exit code -6"), ("sys.exit(3)", "exit code 3")])
def test_a_part_that_breaks_off_keeps_its_rows(tmp_path: Path, more: str, reason: str) -> None:
    part, _ = run(tmp_path / "x.json", more)
    assert part["outcome"] == "raised" and part["reason"].startswith(reason) and part["rows"]


def test_a_part_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apart, "PATIENCE", 1.0)
    deaf = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    begin = time.monotonic()
    part, seen = run(tmp_path / "x.json", deaf, seconds=2.0)
    assert part["reason"].startswith("ended after") and part["rows"] and seen == ["running"]
    assert time.monotonic() - begin < 30


def test_a_half_written_or_missing_file_is_no_part(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    assert apart.read(file, BEGUN) == BEGUN
    file.write_text('{"parts": [')
    assert apart.read(file, BEGUN) == BEGUN


def test_parts_run_one_after_the_other_and_a_broken_one_hides_no_other(tmp_path: Path, monkeypatch) -> None:
    asked = []

    def run_one(command, file, part, seconds, seen):
        asked.append((part["name"], seconds, *command[4:]))
        seen(part)
        row = {"what": "x", "passed": True}
        return {**part, "outcome": "raised" if part["name"] == "graphs" else "done", "rows": [row]}

    monkeypatch.setattr(apart, "run", run_one)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert program.main([str(tmp_path), "--parts", "graphs,leaks", "--seconds", "7"]) == 1
    options = [(f"--parts={name}", "--seconds=7.0", "--here") for name in ("graphs", "leaks")]
    assert asked == [(given[0].partition("=")[2], 7 + apart.GRACE, *given) for given in options]
    written = json.loads((tmp_path / "trust.json").read_text())
    assert [(part["name"], part["outcome"]) for part in written["parts"]] == [("graphs", "raised"), ("leaks", "done")]
    asked.clear()
    assert program.main([str(tmp_path), "--parts", "leaks,soak", "--quick", "--within", "40"]) == 0
    assert [name for name, *_ in asked] == ["leaks", "soak"] and all(limit <= 30 for _, limit, *_ in asked)
    assert all(given[-1] == "--quick" and "--seconds=1.0" in given for given in asked)
    assert program.main([str(tmp_path), "--parts", "soak", "--within", "5"]) == 1
    written = json.loads((tmp_path / "trust.json").read_text())
    assert [(part["outcome"], part["reason"]) for part in written["parts"]] == [("raised", "no time was left")]


def test_a_run_that_is_told_to_end_leaves_no_process_and_a_record(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.trust", str(tmp_path), "--parts", "soak", "--quick"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None and run.stdout.readline().startswith("soak: at most")
        (child,) = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        run.send_signal(signal.SIGTERM)
        assert run.wait(60) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(int(child), 0)
    (part,) = json.loads((tmp_path / "trust.json").read_text())["parts"]
    assert (part["name"], part["outcome"], part["reason"]) == ("soak", "raised", "ended by SystemExit: 143")
