"""Whether a product of many tokens is faster in chunks (gemm/chunks.py): checked and timed beside the whole product."""

import logging
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import torch

from semisparse.errors import EngineError
from semisparse.gemm.autotune.algorithm import Choice, clipped, one_line
from semisparse.gemm.autotune.selection import FINAL, ROUNDS, SECONDS, repeats
from semisparse.stopwatch import Stopwatch

logger = logging.getLogger(__name__)

MARGIN = 0.03
"""Share of the whole product's time that chunks must save: within it two timings of one product may differ."""

CHUNK_SECONDS = SECONDS / 2
"""Wall time that timing may take. One round is finished, however long that takes."""


class CutCandidatesLike(Protocol):
    """What is asked of the candidates of a problem that can be cut; chunk None is the whole product."""

    def fault(self, algorithm: int, chunk: int | None = None) -> str | None:
        """What is wrong with an algorithm's results, or None."""

    def time(self, algorithm: int | None, repeats: int, chunk: int | None = None) -> float:
        """Microseconds per call in a batch of that many calls."""


def faster_way(
    choice: Choice,
    candidates: CutCandidatesLike,
    algorithm: int,
    chunk: int,
    clock: Callable[[], float],
    seconds: float = CHUNK_SECONDS,
) -> Choice:
    """The choice with the sparse product in chunks where that is faster than whole by MARGIN, else as it is.

    Args:
        choice: Of the whole problem, as Selection made it.
        candidates: Checks and times both ways.
        algorithm: For the pieces: the one chosen for a problem of chunk tokens.
        chunk: Tokens per piece.
        clock: Seconds.
        seconds: See CHUNK_SECONDS.

    Returns:
        A choice. Of the sparse product in chunks and the dense one, backend "auto" runs the faster.
    """
    try:
        fault = candidates.fault(algorithm, chunk)
        if fault is not None:
            logger.warning("not cut into chunks of %d tokens: algorithm %d is %s", chunk, algorithm, fault)
            return choice
        if choice.sparse_algorithm is None or choice.sparse_us is None:
            once = candidates.time(algorithm, 1, chunk)
            took = candidates.time(algorithm, repeats(once, *FINAL), chunk)
        else:
            ratio = _ratio(candidates, (choice.sparse_algorithm, None), (algorithm, chunk), clock, seconds)
            logger.info("in chunks of %d tokens: %.3f of the time of the whole product", chunk, ratio)
            if ratio >= 1 - MARGIN:
                return choice
            took = ratio * choice.sparse_us
    except (EngineError, torch.OutOfMemoryError) as error:
        reason = clipped(f"chunks could not be timed: {one_line(error)}")
        logger.info("%s", reason)
        short = isinstance(error, torch.OutOfMemoryError)  # the next run may have the memory: a note is not stored
        return replace(choice, note=choice.note or reason) if short else choice
    chosen = None if choice.dense_us is not None and choice.dense_us <= took else algorithm
    return replace(
        choice, algorithm=chosen, sparse_algorithm=algorithm, sparse_us=took, chunk=chunk, whole_us=choice.sparse_us
    )


def _ratio(
    candidates: CutCandidatesLike,
    whole: tuple[int, int | None],
    cut: tuple[int, int | None],
    clock: Callable[[], float],
    seconds: float,
) -> float:
    """Time in chunks / time of the whole product: median over rounds, measured in turns at the same clock rate."""
    elapsed = Stopwatch(clock)
    counts = [repeats(candidates.time(algorithm, 1, chunk), *FINAL) for algorithm, chunk in (whole, cut)]
    quotients = []
    for _ in range(ROUNDS):
        one, other = (
            candidates.time(algorithm, count, chunk)
            for (algorithm, chunk), count in zip((whole, cut), counts, strict=True)
        )
        quotients.append(other / one)
        if elapsed() > seconds:
            break
    return statistics.median(quotients)
