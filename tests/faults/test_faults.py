"""Faults at the size of a change, and the record of the last night on the page."""

import json
from pathlib import Path

import pytest

from tests import fresh, reliability
from tests.arch.source import ROOT
from tests.faults import report
from tests.faults.fault import Fault, tried
from tests.faults.run import document, faults


@pytest.mark.parametrize(
    "modules",
    [("damage", "disk", "writers", "clocks"), ("killing", "engine", "resharding"), ("training", "forking", "ranks")],
    ids="-".join,
)
def test_what_is_promised_holds(modules: tuple[str, ...]) -> None:
    """In a process of its own: faults fork, set limits and kill."""
    done = fresh.run(
        ROOT / "tests" / "faults" / "run.py", "--size", "change", "--only", *modules, "--keep-record", cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_does_not_hold_is_a_failure_with_its_reason(tmp_path: Path) -> None:
    def fails(count: int, folder: Path) -> dict[str, int]:
        assert count == 3 and folder.is_dir()
        raise AssertionError("not as promised")

    outcome = tried(Fault("item", "name", "holds", 3, 3, fails, "times"), 3)
    assert (outcome.passed, outcome.error) == (False, "AssertionError: not as promised")


def test_names_are_distinct_and_sizes_of_a_night_are_those_of_the_plan() -> None:
    every = [fault for _, fault in faults()]
    assert len({fault.title for fault in every}) == len(every) >= 25
    assert sum(fault.item.startswith("the number of gloo ranks") for fault in every) == 14
    assert {fault.nightly for fault in every if fault.item.startswith("the number of gloo ranks")} == {3}
    assert {fault.nightly for fault in every if fault.item.startswith("kill -9 while")} == {200}
    assert {fault.nightly for fault in every if fault.item.startswith("flipped")} == {500}
    assert all(fault.change <= fault.nightly for fault in every)


def test_the_page_shows_the_record_and_the_record_is_of_a_whole_night() -> None:
    record = json.loads(report.RECORD.read_text(encoding="utf-8"))
    rows = {row["title"]: row for row in record["faults"]}
    assert {fault.title: fault.nightly for _, fault in faults()} == {name: row["size"] for name, row in rows.items()}
    assert record == document([], record)
    assert reliability.PAGE.read_text(encoding="utf-8") == reliability.page()
