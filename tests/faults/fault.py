"""What a fault is, how it is tried, and what is recorded of it."""

import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Size = Literal["change", "nightly"]


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong, and what must hold then.

    Attributes:
        item: The row of the table that it is counted in.
        name: Of this one in that row; "" where it is alone there.
        holds: What must hold, in words of the table.
        change: How often it happens for each change; 0: nightly alone.
        nightly: How often it happens at night.
        run: Takes the number and an empty folder, returns what was counted, and raises AssertionError where something
            does not hold.
        unit: What the sizes count.
        limit: What cannot be promised here; "" where nothing is left out.
    """

    item: str
    name: str
    holds: str
    change: int
    nightly: int
    run: Callable[[int, Path], dict[str, int]]
    unit: str
    limit: str = ""

    @property
    def title(self) -> str:
        """Item and name."""
        return f"{self.item}: {self.name}" if self.name else self.item

    def size(self, size: Size) -> int:
        """How often it happens."""
        return self.change if size == "change" else self.nightly


@dataclass(frozen=True)
class Outcome:
    """What came of a fault.

    Attributes:
        fault: Which.
        size: How often it happened.
        counts: What was counted.
        error: Why it did not pass; "" if it did.
        seconds: That it took.
    """

    fault: Fault
    size: int
    counts: dict[str, int]
    error: str
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether all held."""
        return not self.error


def tried(fault: Fault, size: int) -> Outcome:
    """Let a fault happen, in a folder of its own.

    Args:
        fault: Which.
        size: How often.
    """
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="semisparse-faults-") as folder:
        try:
            counts, error = fault.run(size, Path(folder).resolve()), ""
        except Exception as raised:
            traceback.print_exc()
            counts, error = {}, f"{type(raised).__name__}: {raised}".splitlines()[0][:300]
    return Outcome(fault, size, counts, error, time.monotonic() - begin)


def forked(work: Callable[[], object]) -> int:
    """The id of a new process that does work and ends with exit code 0, or 1 if work raises."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.alarm(120)  # nothing waits for ever
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return child


def ended(child: int) -> int:
    """The exit code of a process, negative for a signal, once it has ended."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
