"""Seconds that have passed, by a clock that may jump: what keeps a budget or reports a duration reads its clock here.

Clocks jump where a virtual machine is resumed or moved, or a process is stopped for a while and continued.
"""

import time
from collections.abc import Callable


class Stopwatch:
    """Seconds since it was made, which never fall: where the clock goes back, it stood still between two readings.

    Time that a clock leaps over has passed for all that can be known. `longest` says whether one step was that long.

    Args:
        clock: Seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._last = clock, clock()
        self._passed = self._longest = 0.0

    def __call__(self) -> float:
        """Read the clock: seconds since the start."""
        now = self._clock()
        step, self._last = max(0.0, now - self._last), now
        self._longest = max(self._longest, step)
        self._passed += step
        return self._passed

    @property
    def longest(self) -> float:
        """The longest time between two readings."""
        return self._longest
