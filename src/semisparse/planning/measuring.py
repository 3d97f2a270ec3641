"""Measuring distinct problems once, each with all candidates, within a budget, from the store where it has them."""

import gc
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from semisparse.config import SparseConfig
from semisparse.gemm.autotune.algorithm import one_line
from semisparse.planning.building import Bench, Built, Compile, compile_static
from semisparse.planning.candidates import DENSE, obstacle
from semisparse.planning.packing import EACH_FORWARD, Packing
from semisparse.planning.problems import LayerUse, LinearProblem
from semisparse.planning.store import Measurement, PlanStore, machine
from semisparse.planning.timing import Call, Mode, Times, cuda_times, plus
from semisparse.stopwatch import Stopwatch

logger = logging.getLogger(__name__)

Timer = Callable[[LinearProblem, Mapping[str, Call], Mode], Mapping[str, Times]]
"""Times calls of a problem; a call that it leaves out cannot be run in this mode."""

CAST, WITHOUT, PACK = "(cast)", "(without the linear)", "(packing) "
NO_MEMORY = "out of memory"


@dataclass(frozen=True)
class Measurer:
    """How problems are measured. Tests replace the timer, the clock and the device.

    Attributes:
        candidates: Settings by name, without dense.
        mode: How the user trains.
        device: Where to measure.
        store: Where times outlive the process; None for nowhere.
        seconds: Budget; what is not measured by then is said to be so. None for no limit.
        progress: Told one line per problem.
        packing: When weights are packed; its accumulation is not measured.
        timer: Times the calls.
        clock: Seconds.
        compile: torch.compile for mode "compiled".
    """

    candidates: Mapping[str, SparseConfig]
    mode: Mode
    device: torch.device
    store: PlanStore | None = None
    seconds: float | None = None
    progress: Callable[[str], None] = logger.info
    packing: Packing = EACH_FORWARD
    timer: Timer = lambda problem, calls, mode: cuda_times(calls, mode)
    clock: Callable[[], float] = time.monotonic
    compile: Compile = compile_static

    def measure(self, problems: Iterable[LinearProblem]) -> dict[LinearProblem, Measurement]:
        """Measure problems in their order, those in the store first.

        Args:
            problems: Distinct ones, the most important first.

        Raises:
            Exception: nn.Linear itself failed, other than by lack of memory.
        """
        elapsed, asked = Stopwatch(self.clock), list(problems)
        found = {problem: stored for problem in asked if (stored := self._load(problem)) is not None}
        missing = [problem for problem in asked if problem not in found]
        if found:
            self.progress(f"{len(found)} of {len(asked)} problems were measured before")
        for number, problem in enumerate(missing, 1):
            spent = elapsed()
            self.progress(f"measuring {number} of {len(missing)}: {problem.size} {problem.dtype} ({spent:.0f} s spent)")
            found[problem] = self._one(problem, elapsed)
        return found

    def _one(self, problem: LinearProblem, elapsed: Stopwatch) -> Measurement:
        def late() -> bool:
            return self.seconds is not None and elapsed() > self.seconds

        unmeasured = f"not measured: the budget of {self.seconds} s was spent"
        if late():
            return Measurement({}, dropped={DENSE: unmeasured}, final=False)
        try:
            bench = Bench(problem, self.mode, self.device, self.compile, self.packing.per_step)
            result = self._compared(bench, late, unmeasured)
        except torch.OutOfMemoryError:
            result = Measurement({}, dropped={DENSE: NO_MEMORY}, final=False)
        self._free()
        if self.store is not None:
            self.store.save(self._key(problem), result)
        return result

    def _compared(self, bench: Bench, late: Callable[[], bool], unmeasured: str) -> Measurement:
        dropped: dict[str, str] = {}
        transient: set[str] = set()
        built: dict[str, Built] = {DENSE: bench.build(None)}
        built[DENSE].call()
        for name, config in self.candidates.items():
            if late():
                dropped[name] = unmeasured
                transient.add(name)
                continue
            try:
                made = bench.build(config)
                if why := obstacle(made.layer, bench.dtype, config):
                    dropped[name] = why
                    continue
                made.call()
                self._wait()
                built[name] = made
            except torch.OutOfMemoryError:
                dropped[name] = NO_MEMORY
                transient.add(name)
            except Exception as error:  # one candidate is left out, with its reason, and not the whole plan
                dropped[name] = f"failed: {one_line(error)}"
                transient.add(name)
        timed = self._timed(bench, built, dropped, transient)
        without, cast = timed.pop(WITHOUT, None), timed.pop(CAST, None)
        times, packs = {}, {}
        for name, made in built.items():
            packed = made.packed
            if name not in timed or (packed is not None and PACK + name not in timed):
                dropped[name] = "it cannot be captured in a CUDA graph"
                continue
            one = timed[name] if without is None else plus(timed[name], without, -1)
            times[name] = Times(one.ms, one.device_ms, one.host_ms, made.held())
            if packed is not None:
                each = plus(Times(0.0, 0.0, 0.0), timed[PACK + name], 1 / packed.count)
                packs[name] = replace(each, held_bytes=packed.held)
        return Measurement(times if DENSE in times else {}, cast, dropped, not transient, packs)

    def _timed(
        self, bench: Bench, built: dict[str, Built], dropped: dict[str, str], transient: set[str]
    ) -> dict[str, Times]:
        """Time what was built; where memory runs out, without the candidate that was built last, until it is enough."""
        while True:
            calls = {name: made.call for name, made in built.items()}
            if any(self.candidates[name].precision is not None for name in built if name != DENSE):
                calls[CAST] = bench.cast()
            if self.mode == "compiled":
                calls[WITHOUT] = bench.without_linear()
            calls |= {PACK + name: made.packed.call for name, made in built.items() if made.packed is not None}
            try:
                return dict(self.timer(bench.problem, calls, self.mode))
            except torch.OutOfMemoryError:
                if list(built) == [DENSE]:
                    raise
                name = next(reversed(built))
                built.pop(name)
                dropped[name] = NO_MEMORY
                transient.add(name)
            calls.clear()
            self._free()

    def _free(self) -> None:
        if self.device.type == "cuda":
            gc.collect()  # layers and graphs of a problem, some of which are in reference cycles
            torch.cuda.empty_cache()

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _load(self, problem: LinearProblem) -> Measurement | None:
        return None if self.store is None else self.store.load(self._key(problem))

    def _key(self, problem: LinearProblem) -> dict[str, Any]:
        return {
            "problem": problem.to_record(),
            "mode": self.mode,
            "candidates": {name: str(config) for name, config in self.candidates.items()},
            "machine": machine(self.device),
            # Named only where it is not at each forward, so that keys of earlier plans stay what they are.
            **({"pack": self.packing.pack} if self.packing.per_step else {}),
        }


def distinct(uses: Iterable[LayerUse]) -> list[LinearProblem]:
    """The problems of layers that may be swapped, those with most work in a step first."""
    work: dict[LinearProblem, float] = {}
    for use in uses:
        if not use.stays:
            for problem, calls in use.calls:
                size = problem.tokens * problem.in_features * problem.out_features
                work[problem] = work.get(problem, 0.0) + calls * size
    return sorted(work, key=lambda problem: -work[problem])
