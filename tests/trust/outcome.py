"""What the parts of the trust suite found: rows with a figure and its limit, in a file that is written as they come."""

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from semisparse.files import write_atomically
from semisparse.gemm.autotune.algorithm import one_line

FILE = "trust.json"
MOST_FAULTS = 20
"""Descriptions of faults that a row keeps; its figure counts all of them."""

MOST_RAISED = 50
"""Cases that may raise before a part ends: after some errors of CUDA all others do."""

ITEMS = {
    "numerics": "B1", "numerics-2": "B1", "algorithms": "B2", "algorithms-2": "B2", "algorithms-3": "B2",
    "algorithms-4": "B2", "determinism": "B3", "sanitizer": "B4", "graphs": "B5",
    "leaks": "B7", "convergence": "B8", "soak": "C1",
}  # fmt: skip
"""What each part is called in the plan."""

Rule = Literal["at most", "at least", "reported"]


class OutOfTime(Exception):
    """A case that would last longer than its part may; rows say how much was done."""


class NotHere(Exception):
    """Something that this machine does not have; the message says what."""


@dataclass
class Row:
    """One line of the table.

    Attributes:
        item: Of the plan: "B1" to "C1".
        what: Was looked at.
        size: How much of it.
        figure: What came out; None where it is not finite.
        limit: What it may be; None where it is only reported.
        rule: How the two compare.
        faults: The first MOST_FAULTS of what was wrong, in words.
    """

    item: str
    what: str
    size: str
    figure: float | None
    limit: float | None = 0
    rule: Rule = "at most"
    faults: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether the figure keeps to its limit."""
        if self.rule == "reported":
            return True
        if self.figure is None or self.limit is None:
            return False
        return self.figure <= self.limit if self.rule == "at most" else self.figure >= self.limit

    def document(self) -> dict[str, Any]:
        """As JSON values."""
        figure = self.figure if self.figure is not None and math.isfinite(self.figure) else None
        kept = self.faults[:MOST_FAULTS]
        return {**asdict(self), "figure": figure, "faults": kept, "passed": figure is not None and self.passed}


@dataclass
class Part:
    """One part while it runs.

    Attributes:
        name: Of the part.
        seconds: Its budget. A part looks at it between measurements, so that one of them may end later.
        clock: Seconds.
        changed: Called after each change.
        rows: What it found so far.
        details: Further JSON values, by name.
    """

    name: str
    seconds: float
    clock: Callable[[], float] = time.monotonic
    changed: Callable[[], None] = lambda: None
    rows: list[Row] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    outcome: str = "running"
    reason: str = ""
    took: float = 0.0
    cases: int = 0
    raised: list[str] = field(default_factory=list)
    begin: float = field(init=False)

    def __post_init__(self) -> None:
        self.begin = self.clock()

    def add(self, row: Row) -> Row:
        """Add a row, which may change until the part ends."""
        self.rows.append(row)
        self.changed()
        return row

    def renew(self, rows: Iterable[Row]) -> None:
        """Replace the rows by what was found up to now."""
        self.rows[:] = rows
        self.changed()

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """One case of many: what it raises is recorded, and the next one can run.

        Args:
            what: The case, in reports.
        """
        self.cases += 1
        try:
            yield
        except NotHere:
            raise
        except OutOfTime:
            self.cases -= 1
        except Exception as error:
            self.raised.append(f"{what}: {one_line(error)}")
            self.changed()

    def left(self) -> float:
        """Seconds of the budget that are left; none after MOST_RAISED errors."""
        return self.seconds - (self.clock() - self.begin) if len(self.raised) < MOST_RAISED else 0.0

    def check(self) -> None:
        """Raise OutOfTime where nothing of the budget is left."""
        if self.left() <= 0:
            raise OutOfTime

    def all_rows(self) -> list[Row]:
        """The rows, and one for the cases that raised."""
        if not self.cases:
            return self.rows
        item = ITEMS.get(self.name, "B")
        return [*self.rows, Row(item, "cases that raised", f"of {self.cases}", len(self.raised), faults=self.raised)]

    def share(self, of: float) -> Callable[[], bool]:
        """Whether a share of the whole budget is left, from now on.

        Args:
            of: From 0 to 1.
        """
        end = self.clock() + of * self.seconds
        return lambda: self.clock() < end and len(self.raised) < MOST_RAISED

    def document(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "name": self.name, "outcome": self.outcome, "reason": self.reason, "budget": self.seconds,
            "seconds": round(self.took or self.clock() - self.begin, 1),
            "rows": [row.document() for row in self.all_rows()], **self.details,
        }  # fmt: skip


def write(path: Path, quick: bool, provenance: dict[str, Any], parts: Sequence[dict[str, Any]]) -> None:
    """Write the file of a run anew; a reader never sees half of it.

    Args:
        path: Of the file.
        quick: Whether sizes were cut.
        provenance: Machine, versions and commit.
        parts: As Part.document gives them.
    """
    document = {"kind": "trust", "quick": quick, "provenance": provenance, "parts": list(parts)}
    write_atomically(path, json.dumps(document, indent=1, allow_nan=False).encode() + b"\n")


class Record:
    """The file of a run.

    Args:
        folder: Where FILE is written.
        quick: Whether sizes were cut.
        provenance: Machine, versions and commit.
    """

    def __init__(self, folder: Path, quick: bool, provenance: dict[str, Any]) -> None:
        self.path, self._quick, self._provenance = folder / FILE, quick, provenance
        self.parts: list[Part] = []

    def save(self) -> None:
        """Write the file anew; a reader never sees half of it."""
        write(self.path, self._quick, self._provenance, [part.document() for part in self.parts])

    @contextmanager
    def part(self, name: str, seconds: float) -> Iterator[Part]:
        """A part of the run; what it raises is recorded, and the next part can run."""
        part = Part(name, seconds, changed=self.save)
        self.parts.append(part)
        try:
            self.save()
            yield part
            part.outcome = "done"
        except NotHere as reason:
            part.outcome, part.reason = "skipped", str(reason)
        except Exception as error:  # a part that fails must not hide the others
            part.outcome, part.reason = "raised", one_line(error)
        except BaseException as error:  # the program is being ended
            part.outcome, part.reason = "raised", f"ended by {one_line(error)}"
            raise
        finally:
            part.took = part.clock() - part.begin
            self.save()

    @property
    def passed(self) -> bool:
        """Whether nothing raised and all figures keep to their limits."""
        return all(part.outcome != "raised" and all(row.passed for row in part.all_rows()) for part in self.parts)
