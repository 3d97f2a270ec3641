"""Plants defects one at a time and runs the tests that should see them: killed, survived, and the record.

    python tests/defects/run.py                               # all of them; the outcomes go into record.json
    python tests/defects/run.py --only signed list:kernels  # by name, file or list
    python tests/defects/run.py --turn "$(git rev-parse HEAD)" --keep-record   # what CI runs

The named tests must pass without a defect first; --turn leaves that to the suite that CI has just run. Each run gets a
process of its own, forked from one that has imported torch, because an import takes longer than the tests. The tests of
csrc build the library themselves. Nothing but the record is written to the tree itself.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.dont_write_bytecode = True  # a compiled file of the same second and size would hide a defect
os.environ |= {"PYTHONDONTWRITEBYTECODE": "1", "CI": "1"}  # with CI, hypothesis draws the same examples each time
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.defects.planting import HERE, ROOT, Defect, DefectError, check, copy_tree, load, planted, turn  # noqa: E402

RECORD = HERE / "record.json"
PATIENCE = 300
"""Seconds for the tests of one defect; a defect that hangs them is killed as well."""
_PASSED, _FAILED = 0, 1  # pytest's exit codes
_HUNG, _NOT_RUN = -1000, 70


@dataclass(frozen=True)
class Outcome:
    """What became of a defect.

    Attributes:
        defect: Which.
        killed: Whether a named test failed.
        seconds: That it took, with building.
        said: The first line of what failed; "" where nothing did.
    """

    defect: Defect
    killed: bool
    seconds: float
    said: str


def warm_up() -> None:
    """Import what all tests import: nothing of the project, and no plugin of pytest, which wants to see its import."""
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
    import pytest  # noqa: F401

    with suppress(ImportError):
        import triton  # noqa: F401


def outcome_of(tests: tuple[str, ...], tree: Path, log: Path) -> int:
    """Exit code of pytest in a forked process, _HUNG where it took too long; its output goes to log."""
    process = os.fork()
    if process == 0:
        code = _NOT_RUN
        try:
            os.setsid()
            code = _run_tests(tests, tree, log)
        except BaseException:
            log.write_text(traceback.format_exc(), encoding="utf-8")
        os._exit(code)
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.killpg(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return _HUNG


def _run_tests(tests: tuple[str, ...], tree: Path, log: Path) -> int:
    """In the forked process: pytest on the copy, which every import comes from."""
    import pytest

    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(target, 1)
    os.dup2(target, 2)
    os.chdir(tree)
    paths = [str(tree), str(tree / "src"), str(tree / "lab" / "src")]
    # The original's own packages must not be found, nor those of an editable installation; an environment there may be.
    own = {ROOT, ROOT / "src", ROOT / "lab" / "src", ROOT / "tests" / "defects"}
    sys.path[:] = [*paths, *(path for path in sys.path if path and Path(path).resolve() not in own)]
    for name in [name for name in sys.modules if name.partition(".")[0] in ("tests", "semisparse", "semisparse_lab")]:
        del sys.modules[name]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    os.environ["TMPDIR"] = str(log.parent)  # tests keep the native library that they build there
    tempfile.tempdir = None
    code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:randomly", *tests])
    import semisparse

    if not Path(semisparse.__file__).is_relative_to(tree):
        print(f"E   the tests imported {semisparse.__file__}")
        code = _NOT_RUN
    sys.stdout.flush()
    return int(code)


def tried(defect: Defect, tree: Path, log: Path) -> Outcome:
    """Plant a defect and run its tests.

    Raises:
        DefectError: The tests could not be run, because the defect is a syntax error, for example.
    """
    start = time.monotonic()
    with planted(defect, tree):
        code = outcome_of(defect.tests, tree, log)
    seconds = time.monotonic() - start
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    if code not in (_PASSED, _FAILED, _HUNG) and code >= 0:  # a crash is seen, too
        raise DefectError(f"{defect.name}: the tests could not be run (exit code {code}):\n{text[-3000:]}")
    said = next((line[1:].strip() for line in text.splitlines() if line.startswith("E  ")), "")
    said = {_HUNG: f"no end within {PATIENCE} s"}.get(code, said or (f"signal {-code}" if code < 0 else ""))
    return Outcome(defect, code != _PASSED, seconds, said[:160])


def without_any(defect: Defect, tree: Path, log: Path) -> None:
    """Raise DefectError unless the tests of a defect pass without it."""
    if (code := outcome_of(defect.tests, tree, log)) != _PASSED:
        raise DefectError(f"{defect.name}: its tests fail without it (exit code {code}):\n{log.read_text()[-4000:]}")


def document(outcomes: list[Outcome], defects: list[Defect], before: dict[str, Any]) -> dict[str, Any]:
    """The record as JSON values: the last outcome of each defect of the list that was tried.

    Args:
        outcomes: Of this run.
        defects: The whole list.
        before: The record so far, or nothing.
    """
    import torch

    last = {one["name"]: one for one in before.get("defects", [])}
    for one in outcomes:
        last[one.defect.name] = {
            "killed": one.killed,
            "seconds": round(one.seconds, 1),
            "torch": str(torch.__version__),
        }
    rows = [
        {"name": one.name, "list": one.listed, "file": one.file,
         **{field: last[one.name][field] for field in ("killed", "seconds", "torch")}}
        for one in defects
        if one.name in last
    ]  # fmt: skip
    return {
        "schema": 1,
        "killed": sum(row["killed"] for row in rows),
        "total": len(rows),
        "survived": [row["name"] for row in rows if not row["killed"]],
        "defects": rows,
    }


def main() -> int:
    """The command line.

    Returns:
        Exit code: 0 if every defect was killed, 1 if one survived, 2 if the list does not fit the tree.
    """
    parser = argparse.ArgumentParser(description="Plant defects and count those that tests kill.")
    parser.add_argument("--only", nargs="+", help="defects whose name, file or list contains one of these")
    parser.add_argument("--turn", help="a key such as a commit: only the defects whose turn it is, none of csrc")
    parser.add_argument("--size", type=int, help="with --turn: how many (default: a tenth of all)")
    parser.add_argument("--keep-record", action="store_true", help=f"do not write {RECORD.name}")
    asked = parser.parse_args()
    start = time.monotonic()
    try:
        every = defects = load()
        check(defects)
        if asked.only:
            defects = [
                one for one in defects if any(part in f"{one.name} {one.file} list:{one.listed}" for part in asked.only)
            ]
        if asked.turn:
            size = asked.size or -(-len(defects) // 10)
            defects = turn([one for one in defects if not one.native], asked.turn, size)
        outcomes = _all(defects, known=bool(asked.turn))
    except DefectError as error:
        print(f"defects: {error}", file=sys.stderr)
        return 2
    seconds = time.monotonic() - start
    if not asked.keep_record:
        before = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
        text = json.dumps(document(outcomes, every, before), indent=1)
        RECORD.write_text(text + "\n", encoding="utf-8")
    survived = [one for one in outcomes if not one.killed]
    killed = len(outcomes) - len(survived)
    print(f"defects: {killed} killed, {len(survived)} survived, {len(outcomes)} in all; {seconds:.0f} s")
    return 1 if survived else 0


def _all(defects: list[Defect], known: bool) -> list[Outcome]:
    """All outcomes; known: the named tests are known to pass without a defect."""
    warm_up()
    outcomes: list[Outcome] = []
    failures: list[str] = []
    with tempfile.TemporaryDirectory(prefix="semisparse-defects-") as scratch:
        tree, log = Path(scratch).resolve() / "tree", Path(scratch).resolve() / "log"
        copy_tree(tree)
        sound: set[tuple[str, ...]] = set()
        for number, defect in enumerate(defects, 1):
            try:
                if not known and defect.tests not in sound:
                    without_any(defect, tree, log)
                    sound.add(defect.tests)
                one = tried(defect, tree, log)
            except DefectError as error:  # the others are tried all the same
                print(f"{number:3}/{len(defects)} ERROR {error}", flush=True)
                failures.append(defect.name)
                continue
            outcomes.append(one)
            verdict = "killed" if one.killed else "SURVIVED"
            print(f"{number:3}/{len(defects)} {verdict:8} {one.seconds:5.1f} s  {defect.name}: {one.said}", flush=True)
    if failures:
        raise DefectError(f"the tests of {len(failures)} could not be run: {', '.join(failures)}")
    return outcomes


if __name__ == "__main__":
    sys.exit(main())
