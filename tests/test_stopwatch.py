"""Seconds that have passed, by clocks that jump."""

import os
import threading
from typing import Any

from semisparse import forks
from semisparse.stopwatch import Stopwatch


def test_seconds_never_fall_and_a_clock_that_goes_back_stood_still() -> None:
    readings = iter([100.0, 101.0, 103.5, -1e9, -1e9 + 2, 5.0])
    watch = Stopwatch(lambda: next(readings))
    assert [watch() for _ in range(4)] == [1.0, 3.5, 3.5, 5.5]
    assert watch.longest == 2.5
    assert watch() == 5.5 + 5 - (-1e9 + 2) and watch.longest == 1e9 + 3


class Owner:
    """Of a lock."""

    def __init__(self) -> None:
        self.lock: Any = threading.Lock()
        forks.renewed_in_children(self, "lock", threading.Lock)


def test_a_lock_is_free_in_a_forked_process_alone() -> None:
    owner = Owner()
    before = owner.lock
    with before:
        child = os.fork()
        if child == 0:
            os._exit(0 if owner.lock.acquire(blocking=False) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert owner.lock is before and before.locked()


def test_an_owner_that_is_gone_is_not_kept() -> None:
    before = len(forks._LOCKS)
    owner = Owner()
    assert len(forks._LOCKS) == before + 1
    del owner
    assert len(forks._LOCKS) == before
