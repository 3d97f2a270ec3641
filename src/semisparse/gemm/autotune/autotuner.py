"""The autotuner: which algorithm of the sparse engine computes a problem, or masked dense where that is faster.

The first call with a problem times every algorithm and checks the fastest (candidates.py, selection.py): half a second
after the preparation. Problems whose token counts fall into one bucket share the result; N and K are exact. It is kept
in the process, for all threads and layers, and on disk (store.py). A stored choice is never timed again. `state` and
`load_state` carry choices from one rank to the others, so that all ranks sum in the same order.

A problem that was measured nowhere else, and is in the table that ships for this GPU and library version with the same
token bucket, takes that choice without being timed, unless SEMISPARSE_TUNE is "all". It is neither stored nor shared.

Tuning is off where SEMISPARSE_TUNE is 0, while torch.use_deterministic_algorithms is on, and inside `paused`; these are
looked at in each call with a problem that has no choice yet. Then the shipped choice with the nearest token count, from
half to twice as many, is used for now, else algorithm 0, unchecked. While a CUDA graph is captured, a problem without a
stored or such a shipped choice raises EngineError. Where the engine cannot be used at all, the choice is masked dense,
with the reason in its note.

Products shorter than one tile of the library's kernels are never tuned (tiles.py): algorithm 0, whatever is stored.
A problem of more tokens than a chunk is also timed in chunks of them (in_chunks.py), with the algorithm of a problem of
chunk tokens, which is tuned for that if it has no choice yet.

Whether a weight gradient in fp8 is sampled at all (ways.py) is a choice like any other: measured once, kept, shared,
taken from a table, and not measured while a graph is captured. Where nothing is measured it is sampled.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch

from semisparse import native
from semisparse.errors import ConfigError, EngineError
from semisparse.forks import renewed_in_children
from semisparse.gemm.autotune.algorithm import Choice, Decides, clipped, likely_first, one_line
from semisparse.gemm.autotune.candidates import Candidates
from semisparse.gemm.autotune.in_chunks import faster_way
from semisparse.gemm.autotune.selection import SECONDS, Selection
from semisparse.gemm.autotune.setting import VARIABLE as VARIABLE
from semisparse.gemm.autotune.setting import setting
from semisparse.gemm.autotune.store import (
    Entry,
    Key,
    Store,
    canonical,
    find_near,
    find_shipped,
    from_document,
    shipped,
    to_document,
)
from semisparse.gemm.autotune.tiles import not_tuned
from semisparse.gemm.autotune.ways import SAMPLED, Way, Ways, faster_of
from semisparse.gemm.chunks import CHUNK, can_be_cut, pieces, sized
from semisparse.gemm.engine import Engine, engine
from semisparse.gemm.operands import Operands
from semisparse.gemm.problem import Problem
from semisparse.gemm.weight_gradient import WeightGradient
from semisparse.stopwatch import Stopwatch

logger = logging.getLogger(__name__)

DEFAULT = Choice(0, 0, None, None, "default")

_REMEMBERED = 8192  # problems whose choice is found without forming its key; past it all are looked up again

Dense = Callable[[Problem, Operands], object]
"""The whole masked-dense alternative, unpacking included, for a problem and its operands."""

Asked = Problem | WeightGradient
"""What is chosen for: the algorithm of a product, or the way to a weight gradient."""


class Autotuner:
    """Choices of one process. The default object: `autotuner()`.

    Args:
        engine: Runs the candidates and says which algorithms exist.
        store: Where choices outlive the process; None for nowhere.
        make_candidates: Makes what is timed; tests inject made-up times.
        clock: Seconds; tests inject a clock.
        shipped: The choices that ship with the package.
        seconds: Wall time that tuning one problem may take after its preparation.
        chunk: Tokens per piece of products that are tried in chunks.
    """

    def __init__(
        self,
        engine: Engine,
        store: Store | None,
        *,
        make_candidates: Callable[[Engine, Problem, Operands, Callable[[], object] | None], Candidates] = Candidates,
        clock: Callable[[], float] = time.perf_counter,
        shipped: Callable[[], Iterable[Entry]] = shipped,
        seconds: float = SECONDS,
        chunk: int = CHUNK,
    ) -> None:
        self._engine, self._store, self._chunk = engine, store, chunk
        self._make_candidates, self._clock, self._shipped, self._seconds = make_candidates, clock, shipped, seconds
        # One problem is decided at a time: two tuning runs on one GPU would disturb each other's times. The way to a
        # weight gradient is measured with products of its own, which may have to be tuned inside.
        self._deciding = threading.RLock()
        renewed_in_children(self, "_deciding", threading.RLock)
        self._measured: dict[str, Entry] = {}  # by canonical key; what state() carries
        self._known: dict[tuple[Asked, int], Choice] = {}  # the same by problem and device, for the hot path
        self._provisional: dict[tuple[Asked, int], Choice] = {}  # unmeasured, until tuning is on again
        self._pauses = 0

    def known(self, asked: Asked, index: int) -> Choice | None:
        """The choice for a problem on a device where this process has a final one, else None; one look-up."""
        return self._known.get((asked, index))

    def choose(self, problem: Problem, index: int, operands: Operands, dense: Dense | None = None) -> Choice:
        """The choice for a problem on a device; where there is none yet, it is tuned on these operands.

        Tuning takes about half a second after its preparation, in chunks too up to 1.5 s, and at most 256 MiB on
        the device. It waits for the current stream only, and leaves PyTorch's random numbers alone. Concurrent callers
        wait for one tuning run. On return operands.out may hold scratch data: run the product afterwards.

        Args:
            problem: The product.
            index: Of the device.
            operands: Of this problem; out is overwritten.
            dense: See Dense; None where there is none.

        Raises:
            EngineError: While a CUDA graph is captured, where there is no choice yet: run a warm-up step first.
            ContextLostError: A candidate ended the CUDA context.
            ConfigError: SEMISPARSE_TUNE is not 0, 1 or all.
        """
        return self._choice(problem, index, lambda: self._tune(problem, index, operands, dense))

    def choose_way(self, gradient: WeightGradient, index: int, sampled: Way, whole: Way) -> Choice:
        """The way to a weight gradient on a device; where there is none yet, both are called and timed.

        Takes about half a second, and once more that for the sparse product if it was not tuned. Else as choose.

        Args:
            gradient: What is computed.
            index: Of the device.
            sampled: See Way.
            whole: The same from all of dy.

        Returns:
            A choice that decides "sampling".

        Raises:
            EngineError, ConfigError: As choose.
        """
        ways = Ways(self._engine.runtime, gradient, index, sampled, whole)
        return self._choice(gradient, index, lambda: faster_of(ways, self._clock, self._seconds))

    def _choice(self, asked: Asked, index: int, tune: Callable[[], Choice]) -> Choice:
        choice = self._known.get((asked, index))
        if choice is not None:
            return choice
        verdict = self._engine.available(index)
        if not verdict.ok:
            return _remember(self._known, asked, index, _without_engine(verdict.reason, asked))
        off = self.off
        if off and (provisional := self._provisional.get((asked, index))):
            return provisional
        with self._deciding:
            choice = self._known.get((asked, index))  # another thread may have decided meanwhile
            return choice or self._decide(asked, index, tune, off)

    def find(self, problem: Asked, index: int) -> Choice | None:
        """The choice for a problem on a device that needs no measurement: known, stored or shipped; else None.

        Args:
            problem: The product, or the weight gradient.
            index: Of the device.

        Returns:
            The choice, which later calls follow; masked dense, with the reason, where there is no engine.
        """
        choice = self._known.get((problem, index))
        if choice is not None:
            return choice
        verdict = self._engine.available(index)
        if not verdict.ok:
            return _remember(self._known, problem, index, _without_engine(verdict.reason, problem))
        with self._deciding:
            return self._found(problem, index, self.key(problem, index))

    @property
    def off(self) -> bool:
        """Whether nothing is measured now.

        Raises:
            ConfigError: SEMISPARSE_TUNE is not 0, 1 or all.
        """
        return setting() == "0" or torch.are_deterministic_algorithms_enabled() or self._pauses > 0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Measure nothing inside the block, on any thread; problems without a choice run as where tuning is off."""
        with self._deciding:
            self._pauses += 1
        try:
            yield
        finally:
            with self._deciding:
                self._pauses -= 1

    def key(self, problem: Asked, index: int) -> Key:
        """All that a choice depends on, as JSON values: device, driver, versions, dtype, orders and shape bucket."""
        machine = {**self._engine.runtime.identity(index), "cusparselt": self._engine.available(index).version}
        return {**machine, **problem.bucket.key()}

    def state(self) -> dict[str, Any]:
        """All measured choices of this process as JSON values, for `load_state` on another rank or in a later run."""
        return to_document(list(self._measured.values()))

    def load_state(self, state: Mapping[str, Any]) -> int:
        """Adopt choices made elsewhere; they replace this process's own.

        A choice is used only where its whole key agrees, so those of another GPU or version are never used. One whose
        algorithm this process's library does not offer is dropped, and logged, at the first call with its problem; the
        problem is then tuned.

        Args:
            state: As `state` returns it.

        Returns:
            How many choices there were.

        Raises:
            ConfigError: The state is damaged; nothing of it is adopted.
        """
        try:
            named = {canonical(key): (key, choice) for key, choice in from_document(state, "shared")}
        except ValueError as error:
            raise ConfigError(
                f"state is not a state of the autotuner ({error}); make it with tuning.state()"
            ) from error
        with self._deciding:
            self._measured.update(named)
            self._known.clear()
            self._provisional.clear()
        native.forget_products()
        logger.info("adopted %d choices made elsewhere", len(named))
        return len(named)

    def choices(self) -> list[Entry]:
        """(key, choice) of each problem bucket with a measured choice, for reports."""
        return list(self._measured.values())

    def used(self) -> list[Entry]:
        """The same of each problem that was asked for, shipped choices included."""
        return [(self.key(asked, index), choice) for (asked, index), choice in list(self._known.items())]

    def _decide(self, asked: Asked, index: int, tune: Callable[[], Choice], off: bool) -> Choice:
        key = self.key(asked, index)
        choice = self._found(asked, index, key)
        if choice is not None:
            return choice
        if off or self._engine.runtime.capturing():
            return self._unmeasured(asked, index, key, off)
        choice = tune()
        # A choice with a note was disturbed by something that the next run may not meet.
        if self._store is not None and not choice.note:
            self._store.save(key, choice)
        self._measured[canonical(key)] = key, choice
        return _remember(self._known, asked, index, choice)

    def _found(self, problem: Asked, index: int, key: Key) -> Choice | None:
        """What is stored or, with the same bucket of tokens, shipped; the default where nothing may be tried."""
        name = canonical(key)
        if reason := not_tuned(problem):
            return _remember(self._known, problem, index, self._short(problem, index, key, reason))
        choice = self._stored(name, key, problem, index)
        if choice is not None:
            self._measured[name] = key, choice
            return _remember(self._known, problem, index, choice)
        choice = None if setting() == "all" else find_shipped(self._shipped(), key)
        if choice is None or not self._offered(choice, problem, index):
            return None
        logger.info("not tuned: %s by %s", problem, choice)
        return _remember(self._known, problem, index, choice)

    def _stored(self, name: str, key: Key, problem: Asked, index: int) -> Choice | None:
        """From this process (its own, or another rank's), else from disk; only what the library offers here."""
        _, choice = self._measured.get(name, (None, None))
        if choice is not None and self._offered(choice, problem, index):
            return choice
        self._measured.pop(name, None)
        choice = None if self._store is None else self._store.load(key)
        return choice if choice is not None and self._offered(choice, problem, index) else None

    def _offered(self, choice: Choice, problem: Asked, index: int) -> bool:
        """Whether the library offers what a choice names; logs where it does not."""
        decides: Decides = "sampling" if isinstance(problem, WeightGradient) else "algorithm"
        if choice.decides != decides:
            logger.warning("ignored a choice (source %r): it decides %r for %s", choice.source, choice.decides, problem)
            return False
        if isinstance(problem, WeightGradient):
            return True
        if choice.sparse_algorithm is None:
            return True
        if choice.chunk is not None and can_be_cut(problem, choice.chunk):
            problem = sized(problem, choice.chunk)
        try:
            offered, reason = self._engine.algorithms(problem, index), ""
        except EngineError as error:
            offered, reason = range(0), f": {one_line(error)}"
        if choice.sparse_algorithm in offered:
            return True
        logger.warning(
            "ignored a choice (source %r): algorithm %d is not among the %d that the library offers for %s%s",
            choice.source, choice.sparse_algorithm, len(offered), problem, reason,
        )  # fmt: skip
        return False

    def _unmeasured(self, problem: Asked, index: int, key: Key, off: bool) -> Choice:
        """A near shipped choice or the default. Not kept among the known ones: tuning may be switched on later."""
        choice = find_near(self._shipped(), key)
        if choice is None or not self._offered(choice, problem, index):
            if not off:
                raise EngineError(
                    f"no algorithm has been chosen yet for {problem}, and tuning cannot run while a CUDA graph is "
                    "captured: run one warm-up step outside the capture first"
                )
            choice = self._default(problem, index)
        logger.info("not tuned: %s by %s", problem, choice)
        return _remember(self._provisional, problem, index, choice)

    def _default(self, problem: Asked, index: int) -> Choice:
        if isinstance(problem, WeightGradient):
            return SAMPLED
        try:
            offered = self._engine.algorithms(problem, index)
        except EngineError as error:
            return _without_engine(one_line(error))
        return DEFAULT if DEFAULT.sparse_algorithm in offered else _without_engine("the library offers no algorithm")

    def _short(self, problem: Asked, index: int, key: Key, reason: str) -> Choice:
        """The default for a product that is not tuned; what is stored or shipped for it is ignored, and that said."""
        _, measured = self._measured.pop(canonical(key), (None, None))
        stored = None if self._store is None else self._store.load(key)
        for given in (measured, stored, find_shipped(self._shipped(), key)):
            if given is not None:
                logger.warning("ignored a choice (source %r) for %s: %s", given.source, problem, reason)
        return replace(default := self._default(problem, index), note=default.note or reason)

    def _chunk_algorithm(self, problem: Problem, index: int, operands: Operands, dense: Dense | None) -> int | None:
        """The algorithm for pieces of a problem: that of its first piece. None where it is not to be cut."""
        if not can_be_cut(problem, self._chunk):
            return None
        part, given = next(pieces(problem, operands, self._chunk))
        tune = partial(self._tune, part, index, given, dense)
        return (self.known(part, index) or self._decide(part, index, tune, off=False)).sparse_algorithm

    def _tune(self, problem: Problem, index: int, operands: Operands, dense: Dense | None) -> Choice:
        chunk_algorithm = self._chunk_algorithm(problem, index, operands, dense)
        logger.info("tuning %s on device %d", problem, index)
        self._engine.runtime.wait(index)  # work that the caller has queued must not count
        elapsed = Stopwatch(self._clock)
        candidates: Candidates | None = None
        try:
            whole_dense = dense and partial(dense, problem, operands)
            candidates = self._make_candidates(self._engine, problem, operands, whole_dense)
            algorithms = likely_first(self._engine.algorithms(problem, index), problem.dtype)
        except EngineError as error:
            if candidates is not None:
                candidates.close(None)
            logger.warning("%s cannot be tuned: %s", problem, error)
            return Choice(None, None, None, None, "tuned", note=one_line(error))
        keep = None
        try:
            choice = Selection(candidates, self._clock, self._seconds).run(algorithms, dense is not None)
            if chunk_algorithm is not None:
                choice = faster_way(choice, candidates, chunk_algorithm, self._chunk, self._clock)
            keep = None if choice.chunk is not None else choice.sparse_algorithm
        finally:
            candidates.close(keep)
        logger.info("tuned %s in %.2f s: %s", problem, elapsed(), choice)
        return choice


def _remember(table: dict[tuple[Asked, int], Choice], problem: Asked, index: int, choice: Choice) -> Choice:
    if len(table) >= _REMEMBERED:
        table.clear()
    table[problem, index] = choice
    return choice


def _without_engine(reason: str, asked: Asked | None = None) -> Choice:
    decides: Decides = "sampling" if isinstance(asked, WeightGradient) else "algorithm"
    return Choice(None, None, None, None, "default", note=clipped(reason), decides=decides)


@cache
def autotuner() -> Autotuner:
    """The process's autotuner, on the process's engine and the user's cache folder. Making it reads nothing."""
    return Autotuner(engine(), Store())
