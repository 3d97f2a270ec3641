"""The self-check: its parts in turn, each with its own budget; what raises is recorded, and the rest runs."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch

from semisparse.environment import environment
from semisparse.errors import ConfigError
from semisparse.gemm.autotune.algorithm import clipped, one_line
from semisparse.planning.candidates import default_candidates
from semisparse.planning.measuring import Measurer
from semisparse.selfcheck import layers, layouts, model, numerics
from semisparse.selfcheck.contents import LayerTimes, Part, Report
from semisparse.selfcheck.machine import gpu
from semisparse.stopwatch import Stopwatch

BUDGET = 300.0
"""Seconds for all parts together, unless another number is given."""

SHARES = {"numerics": 6, "layouts": 1, "layers": 8, "model": 5}
"""Of the budget. What a part leaves over, the next ones have. A part looks at the clock between its measurements, so
that one of them may end later.
"""

TIMED = ("layers", "model")
NO_GPU = "there is no CUDA GPU, so nothing was timed"
QUICK = "quick: numerics and layouts only"


@dataclass
class Running:
    """A self-check that is being made.

    Attributes:
        report: What was found so far.
        device: Where.
        progress: Told one line at a time.
        keep: Called with the report whenever something was added.
        clock: Seconds.
    """

    report: Report
    device: torch.device
    progress: Callable[[str], None]
    keep: Callable[[Report], None]
    clock: Callable[[], float] = time.monotonic
    _elapsed: Stopwatch = field(init=False)
    _ends: dict[str, float] = field(init=False)
    _until: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        runs = [name for name in SHARES if not (self.report.quick and name in TIMED)]
        whole, done = sum(SHARES[name] for name in runs), 0
        self._elapsed, self._ends = Stopwatch(self.clock), {}
        for name in runs:
            done += SHARES[name]
            self._ends[name] = self.report.budget * done / whole

    def part(self, name: str, work: Callable[[], None]) -> None:
        """Run one part.

        Args:
            name: A key of SHARES.
            work: What it does.
        """
        begin = self._elapsed()
        self._until = self._ends[name]
        try:
            work()
            outcome = Part(name, "done", self._elapsed() - begin)
        except Exception as error:  # on a foreign machine anything may go wrong; the next part is tried all the same
            outcome = Part(name, "raised", self._elapsed() - begin, one_line(error))
        self.report.parts.append(outcome)
        self.keep(self.report)

    def skip(self, name: str, reason: str) -> None:
        """Record a part that does not run."""
        self.report.parts.append(Part(name, "skipped", reason=reason))
        self.keep(self.report)

    def left(self) -> float:
        """Seconds that are left for the part that runs."""
        return self._until - self._elapsed()

    def late(self) -> str:
        """Why there is no time for more of this part; "" while there is."""
        return "" if self.left() > 0 else "not checked: the budget was spent"


def selfcheck(
    *,
    quick: bool = False,
    budget: float = BUDGET,
    progress: Callable[[str], None] = lambda line: None,
    keep: Callable[[Report], None] = lambda report: None,
) -> Report:
    """Check this machine: numerics of every path, layouts, four layers, one model.

    Args:
        quick: Nothing is timed.
        budget: Seconds for all parts together.
        progress: Told one line at a time.
        keep: Called with the report so far after each part.

    Raises:
        ConfigError: budget is not a positive number.
    """
    if type(budget) not in (int, float) or not 0 < budget < float("inf"):
        raise ConfigError(f"budget={budget!r} must be a positive number of seconds")
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    found = environment()
    facts = {name: clipped(value) for name, value in found.facts.items()}
    capabilities = [(one.name, clipped(one.path), clipped(one.reason)) for one in found.capabilities]
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    report = Report(started, quick, float(budget), device.type, facts, capabilities, gpu(device))
    running = Running(report, device, progress, keep)
    keep(report)
    running.part("numerics", lambda: _numerics(running))
    if device.type != "cuda":
        for name in ("layouts", *TIMED):
            running.skip(name, NO_GPU if name in TIMED else "there is no CUDA GPU")
        return report
    running.part("layouts", lambda: layouts.find_layouts(device, report.layouts.append))
    if quick:
        for name in TIMED:
            running.skip(name, QUICK)
        return report
    running.part("layers", lambda: _layers(running))
    running.part("model", lambda: _model(running))
    return report


def _numerics(running: Running) -> None:
    setting = numerics.setting_of(running.device)
    numerics.check_paths(setting, running.late, running.progress, running.report.checks.append)


def _layers(running: Running) -> None:
    report, keep = running.report, running.keep
    tell = partial(_tell, running.progress)
    measurer = Measurer(default_candidates(), "eager", running.device, progress=tell)
    with torch.random.fork_rng([running.device]):

        def add(found: LayerTimes) -> None:
            report.layers.append(found)
            report.choices[:] = layers.choices_of([one.problem for one in report.layers])
            keep(report)

        layers.time_layers(measurer, running.left, add)


def _tell(progress: Callable[[str], None], line: str) -> None:
    progress(f"layers: {line}")


def _model(running: Running) -> None:
    running.report.model = model.time_model(running.device, default_candidates(), running.left, running.progress)
