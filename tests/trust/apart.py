"""Each part in a process of its own: what one of them breaks or holds up does not reach the next one."""

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

GRACE = 60.0
"""Seconds that a part may take beyond its budget: to start, and for the measurement that it has begun."""

PATIENCE = 10.0
"""Seconds from asking a program to end until it is killed."""

POLL = 0.5
_PR_SET_PDEATHSIG = 1

Document = dict[str, Any]


def run(
    command: Sequence[str], file: Path, part: Document, seconds: float, seen: Callable[[Document], None]
) -> Document:
    """Run a program that does one part, and end it if it takes too long.

    Args:
        command: The program; it writes file.
        file: As outcome.write has it, with one part.
        part: The document of the part as long as there is no file.
        seconds: After which the program is ended.
        seen: Called with each new document of the part.

    Returns:
        The last document. Where the program did not come to its end, it says so.
    """
    file.unlink(missing_ok=True)
    begin, at, late = time.monotonic(), None, False
    child = subprocess.Popen(command, start_new_session=True)
    try:
        while child.poll() is None and not (late := time.monotonic() - begin > seconds):
            time.sleep(POLL)
            stamp = file.stat().st_mtime_ns if file.exists() else None
            if stamp != at:
                at, part = stamp, read(file, part)
                seen(part)
    except BaseException:  # this program is told to end
        end(child)
        seen(read(file, part))
        raise
    end(child)
    part = read(file, part)
    if part["outcome"] == "running" or (late and part["outcome"] != "done"):
        why = (
            f"ended after {time.monotonic() - begin:.0f} s" if late else f"exit code {child.returncode} before its end"
        )
        part = {**part, "outcome": "raised", "reason": why}
    return part


def read(file: Path, otherwise: Document) -> Document:
    """The part that a file holds; otherwise another one."""
    with contextlib.suppress(OSError, ValueError, LookupError):
        found: Document = json.loads(file.read_text(encoding="utf-8"))["parts"][0]
        return found
    return otherwise


def end(child: "subprocess.Popen[Any]", patience: float = PATIENCE) -> None:
    """End a process that leads a session of its own: it is asked, then killed with all of its group.

    Args:
        child: The process.
        patience: Seconds for it to end what it has started itself.
    """
    for number in (signal.SIGTERM, signal.SIGKILL):
        if child.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):  # one that a driver holds cannot even be killed
                child.wait(patience)


def obey() -> None:
    """SIGTERM ends this program by an exception, so that what it started is ended and what it found is written."""

    def leave(number: int, frame: object) -> NoReturn:
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, leave)


def die_with_parent() -> None:
    """Be asked to end where the process that started this one is gone."""
    with contextlib.suppress(AttributeError, OSError):  # of Linux
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
