"""Selection of the best candidate: which are checked and timed, in what order, for how long, and which is chosen.

Knows neither CUDA nor tensors: checking, timing and the clock are passed in.
"""

import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol, TypeVar

import torch

from semisparse.errors import EngineError
from semisparse.gemm.autotune.algorithm import Choice, Decides, clipped, one_line
from semisparse.stopwatch import Stopwatch

SECONDS = 0.5
"""Wall time that tuning one problem may take: half for a rough timing of all candidates, a quarter for checking."""

LEAP = 10.0
"""Seconds between two looks at the clock beyond which it has leapt, or the process stood still: no step takes as long.
All that is left of the time limit is gone then, so such a choice has a note and is not stored."""

NOT_REACHED = "not reached within the time limit"

_FINALISTS = 3
ROUNDS = 5
# Microseconds and most calls of a batch: in the rough timing of all, and between the best, where it must be long enough
# for a power-limited GPU to react. The limit on calls is for small problems, whose launches have to be queued first.
_SCREEN, FINAL = (2_000.0, 30), (10_000.0, 100)
_FEWEST = 3

_MASKED_DENSE: Mapping[int | None, str] = {None: "masked dense"}

_Result = TypeVar("_Result")


class CandidatesLike(Protocol):
    """What a selection asks of the candidates of one problem. None stands for the dense alternative."""

    def fault(self, algorithm: int) -> str | None:
        """What is wrong with an algorithm's results, or None."""

    def time(self, algorithm: int | None, repeats: int) -> float:
        """Microseconds per call in a batch of that many calls."""


class Selection:
    """Time all candidates roughly, check the fastest, time the best of the right ones precisely, and choose.

    No candidate is chosen unchecked. An algorithm that gives wrong results, fails, runs out of memory or is not reached
    in time is left out, and `rejected` of the choice says why; one that is only slow is not checked.

    Args:
        candidates: Checks and times them.
        clock: Seconds.
        seconds: Wall time that it may take from here on.
        names: Of the candidates in notes, where they are not algorithms and the masked-dense product.
        decides: As Choice's.
    """

    def __init__(
        self,
        candidates: CandidatesLike,
        clock: Callable[[], float],
        seconds: float = SECONDS,
        names: Mapping[int | None, str] = _MASKED_DENSE,
        decides: Decides = "algorithm",
    ) -> None:
        self._candidates, self._seconds = candidates, seconds
        self._names: Mapping[int | None, str] = names
        self._decides: Decides = decides
        self._elapsed = Stopwatch(clock)
        self._rejected: dict[int, str] = {}
        self._note = ""

    def run(self, algorithms: Iterable[int], dense: bool) -> Choice:
        """The choice among algorithms and, if dense, the dense alternative, which also wins a tie."""
        times = self._screen(algorithms)
        finalists: list[int | None] = [*self._check(sorted(times, key=lambda algorithm: times[algorithm]))]
        medians = self._finals(finalists + [None] * dense)
        dense_us = medians.pop(None, None)
        rejected = tuple(sorted(self._rejected.items()))
        self._elapsed()
        if self._elapsed.longest > LEAP and not self._note:
            self._note = f"the clock went {self._elapsed.longest:.0f} s on during one step of tuning"
        if not medians:
            return Choice(None, None, None, dense_us, "tuned", rejected, self._note, decides=self._decides)
        fastest = min(medians, key=lambda algorithm: medians[algorithm])
        sparse_us = medians[fastest]
        chosen = None if dense_us is not None and dense_us <= sparse_us else fastest
        return Choice(chosen, fastest, sparse_us, dense_us, "tuned", rejected, self._note, decides=self._decides)

    def _screen(self, algorithms: Iterable[int]) -> dict[int, float]:
        """Time every candidate once, correct or not.

        The precise measurement is skipped for one that is over 2x slower than the best so far.
        """
        times: dict[int, float] = {}
        for algorithm in algorithms:
            if times and self._spent(0.5):
                self._rejected[algorithm] = NOT_REACHED
                continue
            # The first launch of a kernel loads the kernel; that must not count.
            once = self._attempt(algorithm, self._candidates.time, algorithm, 1)
            if once is not None:
                once = self._attempt(algorithm, self._candidates.time, algorithm, 1)
            if once is not None and once < 2 * min(times.values(), default=once):
                once = self._attempt(algorithm, self._candidates.time, algorithm, repeats(once, *_SCREEN))
            if once is not None:
                times[algorithm] = once
        return times

    def _check(self, ranked: Iterable[int]) -> list[int]:
        """The fastest whose results are right. The search goes on until one is found, however long that takes."""
        sound: list[int] = []
        for algorithm in ranked:
            if len(sound) == _FINALISTS or (sound and self._spent(0.75)):
                break
            fault = self._attempt(algorithm, self._candidates.fault, algorithm)
            if fault is not None:
                self._rejected[algorithm] = fault
            elif algorithm not in self._rejected:
                sound.append(algorithm)
        return sound

    def _finals(self, contenders: list[int | None]) -> dict[int | None, float]:
        """Median times, measured in turns, so that all contenders run at the same clock rate and temperature."""
        samples: dict[int | None, list[float]] = {contender: [] for contender in contenders}
        counts: dict[int | None, int] = {}
        for contender in contenders:
            once = self._attempt(contender, self._candidates.time, contender, 1)
            if once is not None:
                counts[contender] = repeats(once, *FINAL)
        for _ in range(ROUNDS):
            for contender in [contender for contender in contenders if contender in counts]:
                measured = self._attempt(contender, self._candidates.time, contender, counts[contender])
                if measured is None:
                    del counts[contender]
                else:
                    samples[contender].append(measured)
            if self._spent(1.0):
                break
        return {contender: statistics.median(samples[contender]) for contender in counts}

    def _attempt(self, contender: int | None, call: Callable[..., _Result], *arguments: int | None) -> _Result | None:
        """The call's result, or None, with the reason noted, where the library refuses or memory runs out."""
        try:
            return call(*arguments)
        except (EngineError, torch.OutOfMemoryError) as error:
            reason = one_line(error)
            if contender is not None:
                self._rejected[contender] = reason
            if contender is None or isinstance(error, torch.OutOfMemoryError):
                who = self._names.get(contender, f"algorithm {contender}")
                self._note = clipped(f"{who} could not be timed: {reason}")
            return None

    def _spent(self, share: float) -> bool:
        return self._elapsed() > share * self._seconds


def repeats(once_us: float, batch_us: float, most: int) -> int:
    """How many calls make a batch.

    Args:
        once_us: Microseconds of one call.
        batch_us: Microseconds that a batch should take.
        most: Calls of a batch, at most.
    """
    return min(most, max(_FEWEST, round(batch_us / max(once_us, 1e-3))))
