"""Clocks are read where a jump does no harm, and locks are free in forked processes (tests/faults lets both happen)."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from tests.arch.source import PACKAGE, ROOT

FILES = sorted((*PACKAGE.rglob("*.py"), *(ROOT / "lab" / "src").rglob("*.py")))

# Of time and datetime: what is called, in which files, and why a jump is harmless there.
CALLED = {
    ("time.perf_counter", "planning/timing.py"): "the median of five bursts",
    ("time.strftime", "selfcheck/running.py"): "a date in a report, which nothing compares",
    ("time.gmtime", "selfcheck/running.py"): "the same",
    ("datetime.now", "report/run_document.py"): "a date in a result, which nothing compares",
    ("datetime.now", "report/timed_document.py"): "the same",
}
STAMPS = {("path.stat", "data/linux.py"): "of files of a package, as it has them"}


def calls(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func)


def short(path: Path) -> str:
    return "/".join(path.parts[-2:])


def test_clocks_are_read_by_a_stopwatch_or_where_it_is_said_why_not() -> None:
    found = {
        (call, short(path))
        for path in FILES
        for call in calls(path)
        if re.match(r"time\.|datetime\.(now|today|utc)\w*$", call)
    }
    assert found == set(CALLED)
    for path in FILES:
        assert not re.search(
            r"from time import|import time as|os\.times\(|getrusage", path.read_text(encoding="utf-8")
        ), path


def test_no_other_stamp_of_a_file_is_read() -> None:
    found = {
        short(path) for path in FILES if re.search(r"st_[mca]time|getmtime|getctime", path.read_text(encoding="utf-8"))
    }
    assert found == {name for _, name in STAMPS}


def test_each_lock_is_renewed_in_forked_processes() -> None:
    locks = 0
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        made = re.findall(r"(\w+) = (threading\.R?Lock)\(\)", text)
        assert len(made) == len(re.findall(r"threading\.(?:R?Lock|Condition|\w*Semaphore|Event|Barrier)\(", text)), (
            f"{path}: another lock"
        )
        for name, kind in made:
            assert re.search(rf'renewed_in_children\([^,]+, "{name}", {re.escape(kind)}\)', text), f"{path}: {name}"
        locks += len(made)
    assert locks == 5
