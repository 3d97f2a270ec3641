"""Whether a weight gradient is computed from a sample of dy or from all of it: both ways timed as wholes."""

import logging
from collections.abc import Callable
from contextlib import suppress

import torch

from semisparse.errors import EngineError
from semisparse.gemm.autotune.algorithm import Choice
from semisparse.gemm.autotune.selection import Selection
from semisparse.gemm.runtime import CudaRuntime
from semisparse.gemm.weight_gradient import WeightGradient
from semisparse.stopwatch import Stopwatch

logger = logging.getLogger(__name__)

SAMPLED = Choice(0, 0, None, None, "default", decides="sampling")
"""What the settings ask for, where nothing was measured."""

NAMES = {0: "the sampled dW", None: "the dense fp8 dW"}

_LAUNCHES = 8
"""Most kernels of a way, allocations aside. What a call costs the host must be hidden while the device is timed."""

Way = Callable[[], object]
"""Computes a weight gradient, with its allocations; the result is dropped."""


class Ways:
    """The two ways as the candidates of a selection: algorithm 0 samples, None does not.

    What they compute is not compared, since it differs by the sample. The algorithm of the sparse product was checked
    when that product was tuned.

    Args:
        runtime: Times them.
        gradient: What they compute.
        index: Of the device.
        sampled: See Way.
        whole: The same from all of dy.
    """

    def __init__(self, runtime: CudaRuntime, gradient: WeightGradient, index: int, sampled: Way, whole: Way) -> None:
        self.gradient = gradient
        self._runtime, self._index, self._ways = runtime, index, {0: sampled, None: whole}

    def warm_up(self) -> None:
        """Call both, so that everything in them is compiled and tuned, and wait for what the caller has queued."""
        with suppress(EngineError, torch.OutOfMemoryError):  # of which the selection makes something
            for way in self._ways.values():
                way()
        self._runtime.wait(self._index)

    def fault(self, algorithm: int) -> str | None:
        """Nothing."""
        return None

    def time(self, algorithm: int | None, repeats: int) -> float:
        """Microseconds per call, back to back."""
        return self._runtime.time(self._index, self._ways[algorithm], repeats, launches=_LAUNCHES)


def faster_of(ways: Ways, clock: Callable[[], float], seconds: float) -> Choice:
    """The faster way: algorithm 0 of the choice samples, None does not.

    Args:
        ways: Both.
        clock: Seconds.
        seconds: Wall time that it may take, after the first call of each.
    """
    logger.info("timing both ways to %s", ways.gradient)
    ways.warm_up()
    elapsed = Stopwatch(clock)
    choice = Selection(ways, clock, seconds, NAMES, decides="sampling").run([0], dense=True)
    logger.info("chose for %s in %.2f s: %s", ways.gradient, elapsed(), choice)
    return choice
