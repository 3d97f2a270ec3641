"""Choosing how to compute a problem: which algorithm of the sparse engine, or masked dense where that is faster.

The first call with a problem times every algorithm and checks the fastest, dropping wrong ones (trial.py, race.py), for
about half a second. Problems whose token counts fall into one bucket share the result; N and K are exact. It is kept in
the process, for all threads and layers, and on disk (tuning_cache.py). A stored choice is never timed again; `state`
and `load_state` carry choices from one rank to the others, so that all of them sum in the same order.

Tuning is off where SEMISPARSE_TUNE is 0 and while torch.use_deterministic_algorithms is on; both are read when a
problem is met. Then a stored choice serves, else a shipped one, else algorithm 0, unchecked. While a CUDA graph is
captured, a problem with neither a stored nor a shipped choice raises EngineError. Where the engine cannot be used at
all, the choice is masked dense, with the reason in its note.
"""

import os
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

from semisparse.errors import ConfigError, EngineError
from semisparse.gemm import shipped
from semisparse.gemm.choice import Choice, clipped, from_record, one_line
from semisparse.gemm.engine import Engine, engine
from semisparse.gemm.problem import Problem
from semisparse.gemm.race import SECONDS, Race
from semisparse.gemm.trial import Operands, Trial
from semisparse.gemm.tuning_cache import SCHEMA, TuningCache, canonical

VARIABLE = "SEMISPARSE_TUNE"
DEFAULT = Choice(0, 0, None, None, "default")

_LIKELY = {torch.bfloat16: (17, 20, 12, 0, 15, 14, 1), torch.float16: (6, 5, 27, 1, 28, 7, 13)}
"""Algorithms tried first: the fastest on one H200. The first use of an fp16 kernel takes 0.15 to 0.25 s there, so that
few are reached in time; for bf16 all are, except at the largest problems."""

_REMEMBERED = 8192  # problems whose choice is found without forming its key; past it all are looked up again


class Tuner:
    """Choices for one process. The default one: `tuner()`.

    cache: where choices outlive the process, None for nowhere. make_trial, clock, rows: replaced in tests.
    """

    def __init__(
        self,
        engine: Engine,
        cache: TuningCache | None,
        *,
        make_trial: Callable[[Engine, Problem, Operands], Trial] = Trial,
        clock: Callable[[], float] = time.perf_counter,
        rows: Callable[[], tuple[dict[str, Any], ...]] = shipped.table,
        seconds: float = SECONDS,
    ) -> None:
        self._engine, self._cache = engine, cache
        self._make_trial, self._clock, self._rows, self._seconds = make_trial, clock, rows, seconds
        self._lock = threading.Lock()
        self._turns: dict[str, threading.Lock] = {}
        self._choices: dict[str, tuple[dict[str, object], Choice]] = {}
        self._known: dict[tuple[Problem, int], Choice] = {}
        self._provisional: dict[tuple[Problem, int], Choice] = {}
        self._absent: set[str] = set()
        self._identities: dict[int, dict[str, object]] = {}

    def known(self, problem: Problem, index: int) -> Choice | None:
        """The choice for a problem on a device where one is stored in this process, else None; costs a look-up."""
        return self._known.get((problem, index))

    def choose(self, problem: Problem, index: int, operands: Operands) -> Choice:
        """The choice for a problem on a device; where there is none yet, tuned on these operands.

        operands: of this very problem; operands.out is overwritten, and the caller computes its product afterwards.
        Takes at most about half a second and 256 MiB on the device, waits for the current stream only, and leaves
        PyTorch's random numbers alone. One thread tunes a problem, others that meet it wait for the result. What it
        wrote to out is not the product.

        Raises EngineError under CUDA-graph capture where there is no choice yet: run a warm-up step first.
        Raises ConfigError when SEMISPARSE_TUNE is neither 0 nor 1.
        """
        choice = self._known.get((problem, index))
        if choice is not None:
            return choice
        verdict = self._engine.available(index)
        if not verdict.ok:
            return self._remember(problem, index, _without_engine(verdict.reason))
        off, capturing = _tuning_is_off(), self._engine.runtime.capturing()
        if off and (provisional := self._provisional.get((problem, index))):
            return provisional
        key = self.key(problem, index)
        name = canonical(key)
        choice = self._stored(name, key, problem, index)
        if choice is None and (off or capturing):
            return self._untuned(problem, index, key, off)
        if choice is None:
            with self._turn(name):
                choice = self._stored(name, key, problem, index) or self._tune(problem, index, operands)
                self._keep(name, key, choice)
                # A choice with a note was disturbed by what may be gone in the next run.
                if self._cache is not None and choice.source == "tuned" and not choice.note:
                    self._cache.store(key, choice)
        return self._remember(problem, index, choice)

    def _remember(self, problem: Problem, index: int, choice: Choice) -> Choice:
        if len(self._known) >= _REMEMBERED:
            self._known.clear()
        self._known[problem, index] = choice
        return choice

    def key(self, problem: Problem, index: int) -> dict[str, object]:
        """All that a choice depends on, as JSON values: device, driver, versions, dtype, layout and shape bucket."""
        if index not in self._identities:
            version = self._engine.available(index).version
            self._identities[index] = {**self._engine.runtime.identity(index), "cusparselt": version}
        bucket = problem.bucket
        return self._identities[index] | {
            "dtype": str(problem.dtype).removeprefix("torch."),
            "b_order": problem.b_order,
            "d_order": problem.d_order,
            "bias": problem.bias,
            "token_axis": problem.token_axis,
            "rows": bucket.rows,
            "reduction": bucket.reduction,
            "columns": bucket.columns,
        }

    def state(self) -> dict[str, Any]:
        """All measured choices of this process as JSON values, for `load_state` on another rank or in a later run."""
        with self._lock:
            choices = [{"key": key, "choice": choice.to_record()} for key, choice in self._choices.values()]
        return {"schema": SCHEMA, "choices": choices}

    def load_state(self, state: Mapping[str, Any]) -> int:
        """Adopt choices made elsewhere; they replace this process's own. Returns how many there were.

        A choice serves only where its whole key agrees, so those of another GPU or version do no harm. One whose
        algorithm this process's library does not offer is dropped with a warning when its problem is met, and that
        problem is tuned anew.
        Raises ConfigError for a damaged state, and adopts nothing of it.
        """
        try:
            if set(state) != {"schema", "choices"}:
                raise ValueError("it must have exactly the fields schema, choices")
            if type(state["schema"]) is not int or state["schema"] != SCHEMA:
                raise ValueError(f"schema {state['schema']!r}, this version reads {SCHEMA}")
            entries = [(dict(entry["key"]), from_record(entry["choice"], "shared")) for entry in state["choices"]]
            named = {canonical(key): (key, choice) for key, choice in entries}
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise ConfigError(f"state is no state of a tuner ({error}); make it with Tuner.state()") from error
        with self._lock:
            self._choices.update(named)
            self._known.clear()
            self._provisional.clear()
        return len(named)

    def choices(self) -> Iterable[tuple[dict[str, object], Choice]]:
        """(key, choice) of each problem bucket met so far, for reports."""
        with self._lock:
            return list(self._choices.values())

    def _stored(self, name: str, key: dict[str, object], problem: Problem, index: int) -> Choice | None:
        """From this process (its own, or from another rank), else from disk; only what the library offers here."""
        with self._lock:
            found = self._choices.get(name)
        if found is not None:
            if self._offered(found[1], problem, index):
                return found[1]
            with self._lock:
                self._choices.pop(name, None)
        if self._cache is None or name in self._absent:
            return None
        choice = self._cache.load(key)
        if choice is None or not self._offered(choice, problem, index):
            self._absent.add(name)
            return None
        self._keep(name, key, choice)
        return choice

    def _offered(self, choice: Choice, problem: Problem, index: int) -> bool:
        """Whether the library has what a choice names; warns where it has not."""
        if choice.sparse_algorithm is None:
            return True
        try:
            offered = self._engine.algorithms(problem, index)
        except EngineError as error:
            offered, reason = range(0), f": {one_line(error)}"
        else:
            reason = ""
        if choice.sparse_algorithm in offered:
            return True
        warnings.warn(
            f"a stored choice (source {choice.source!r}) names an algorithm that {problem} has not, "
            f"{choice.sparse_algorithm} of {len(offered)}; it is ignored{reason}",
            RuntimeWarning,
            stacklevel=5,
        )
        return False

    def _untuned(self, problem: Problem, index: int, key: dict[str, object], off: bool) -> Choice:
        found = shipped.find(self._rows(), key)
        if found is not None and self._offered(found, problem, index):
            choice = found
        elif off:
            choice = self._default(problem, index)
        else:
            raise EngineError(
                f"no algorithm has been chosen yet for {problem}, and tuning cannot run while a CUDA graph is "
                "captured: run one warm-up step outside the capture first"
            )
        # Not among the stored choices: tuning may be switched on later.
        self._provisional[problem, index] = choice
        return choice

    def _default(self, problem: Problem, index: int) -> Choice:
        try:
            offered = self._engine.algorithms(problem, index)
        except EngineError as error:
            return _without_engine(one_line(error))
        return DEFAULT if DEFAULT.sparse_algorithm in offered else _without_engine("the library offers no algorithm")

    def _tune(self, problem: Problem, index: int, operands: Operands) -> Choice:
        self._engine.runtime.wait(index)  # what the caller has queued must not count
        begin = self._clock()
        try:
            candidates = _likely_first(self._engine.algorithms(problem, index), problem.dtype)
            trial = self._make_trial(self._engine, problem, operands)
        except EngineError as error:
            return Choice(None, None, None, None, "tuned", note=one_line(error))
        choice = None
        try:
            race = Race(trial, self._clock, self._seconds - (self._clock() - begin))
            choice = race.run(candidates, operands.dense is not None)
        finally:
            trial.close(None if choice is None else choice.sparse_algorithm)
        return choice

    def _keep(self, name: str, key: dict[str, object], choice: Choice) -> None:
        with self._lock:
            self._choices[name] = key, choice

    @contextmanager
    def _turn(self, name: str) -> Iterator[None]:
        with self._lock:
            turn = self._turns.setdefault(name, threading.Lock())
        with turn:
            yield


def _without_engine(reason: str) -> Choice:
    return Choice(None, None, None, None, "default", note=clipped(reason))


def _likely_first(algorithms: Iterable[int], dtype: torch.dtype) -> list[int]:
    likely = _LIKELY[dtype]
    return sorted(algorithms, key=lambda number: likely.index(number) if number in likely else len(likely))


def _tuning_is_off() -> bool:
    value = os.environ.get(VARIABLE, "1")
    if value not in ("0", "1"):
        raise ConfigError(f"{VARIABLE}={value!r} is neither 0 (never tune) nor 1 (tune a problem when it is first met)")
    return value == "0" or torch.are_deterministic_algorithms_enabled()


@cache
def tuner() -> Tuner:
    """The process's tuner, on the process's engine and the user's cache folder. Making it reads nothing."""
    return Tuner(engine(), TuningCache())
