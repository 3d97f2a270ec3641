"""A guard that ends the sparse phase early where the training loss diverges."""

import logging
import math
from numbers import Real
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from semisparse.errors import ConfigError, ScheduleError
from semisparse.schedule.guard_state import GuardReport, GuardState, from_record
from semisparse.schedule.phases import sparse_since, sparse_stretches
from semisparse.schedule.ranks import mean_over_ranks
from semisparse.schedule.reference_curve import Reference, reference_curve
from semisparse.schedule.sparse_schedule import SparseSchedule

logger = logging.getLogger(__name__)

STANDARD_ERRORS = 6
"""By which the smoothed loss must exceed the reference, beside the tolerance.

About 4 of the difference of two such averages. In simulated runs with independent noise none tripped falsely. Noise
that stays similar from step to step is estimated too low and can still trip it: smooth longer or tolerate more then.
"""


class LossGuard:
    """Compares the training loss of a sparse phase with a reference, and ends the phase if the loss is too high.

    Call update(loss) once after each schedule.step(). Losses stay on their device; every `interval` applied steps they
    are read (one synchronisation), averaged over the ranks of the schedule's group (one all-gather), smoothed and
    compared. The smoothed loss is an exponential average of the means of intervals: it begins with the sparse phase,
    forgets losses within about `smoothing` steps, and is compared once it holds that many, of two intervals or more. A
    comparison is above the limit if

        smoothed loss > reference + tolerance * |reference| + 6 standard errors of the smoothed loss,

    where the standard error follows from the differences of successive intervals. It is too small if batches resemble
    those before them for longer than an interval, as without shuffling; use a longer one then.

    After `patience` comparisons in a row above it, the guard calls schedule.end_sparse_phase(), so that all remaining
    steps are dense, and logs a warning with the figures (logger "semisparse").

    The reference is one of two:

    - *Another run*, such as a dense one with the same data and learning rate. Its losses are smoothed with the same
      weights at the same steps, so that both lag alike; the standard error is that of the difference, in which noise of
      batches that both runs share cancels. Losses between its steps lie on straight lines. Steps before its first and
      beyond its last are not compared; the latter is logged.
    - *The run itself* (reference=None): the lowest smoothed loss of this sparse phase so far. It finds a loss that
      rises, not one that falls more slowly than a dense run's would. A fit of the first steps, extrapolated, would
      claim to find that, too, but where a loss goes depends on the learning rate, and a plateau is not a divergence.

    A mean loss that is NaN or infinite on any rank is left out and counted; if all of an interval are, that is a
    comparison above the limit. The weights may then hold NaN, too, and being dense does not repair them: go back to a
    checkpoint. A step that a GradScaler skipped does not count, so its loss is ignored.

    Args:
        schedule: Of the training; any recipe's, too.
        reference: Losses of another run by applied step, counted from 1: a mapping; or the path of a .json file with
            {"step": loss, ...} or [[step, loss], ...], or of a .csv file with the columns step and loss. None: the run
            itself.
        tolerance: Share of the reference by which the smoothed loss may exceed it. With a dense run as reference it
            must be more than what 2:4 costs in the sparse phase, which the dense phase is there to make up for.
        smoothing: Applied steps after which the weight of a loss has fallen by e.
        patience: Comparisons in a row above the limit.
        interval: Applied steps from one comparison to the next.

    Raises:
        ConfigError: An argument is not one of its values.
        ScheduleError: The reference cannot be read or is no curve, or the guard could never trip, because the sparse
            phases (within the reference) are too short.
    """

    def __init__(
        self,
        schedule: SparseSchedule,
        reference: Reference | None = None,
        *,
        tolerance: float = 0.02,
        smoothing: int = 100,
        patience: int = 3,
        interval: int = 10,
    ) -> None:
        if not isinstance(schedule, SparseSchedule):
            raise ConfigError(f"schedule is a {type(schedule).__name__}; pass a SparseSchedule or RecipeSchedule")
        if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)) or not 0 <= tolerance < math.inf:
            raise ConfigError(f"tolerance={tolerance!r} must be a share of the reference, 0 or more, such as 0.02")
        for name, value in (("smoothing", smoothing), ("patience", patience), ("interval", interval)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name}={value!r} must be a whole number, 1 or more")
        self._schedule, self._tolerance = schedule, float(tolerance)
        self._smoothing, self._patience, self._interval = smoothing, patience, interval
        self._reference = None if reference is None else reference_curve(reference)
        self._check_length()
        self._state = GuardState()
        self._steps: list[int] = []
        self._losses: Tensor | None = None
        self._said_end = False

    def _check_length(self) -> None:
        """Raise ScheduleError if no sparse phase is so long that the guard could trip in it."""
        windows = max(2, -(-self._smoothing // self._interval)) + self._patience - (self._reference is not None)
        needed = windows * self._interval + 1  # at its last step the phase ends by itself
        stretches = sparse_stretches(self._schedule.phases)
        if self._reference is not None:
            first, last = self._reference.first, self._reference.last
            stretches = [(max(begin, first - 1), min(end, last)) for begin, end in stretches]
        longest = max((end - begin for begin, end in stretches), default=0)
        if longest < needed and self._schedule.ended_at is None:
            within = "" if self._reference is None else f" of which the reference (steps {first} to {last}) has losses"
            raise ScheduleError(
                f"the guard needs {needed} sparse steps before it can trip (smoothing={self._smoothing}, patience="
                f"{self._patience}, interval={self._interval}), and the longest sparse phase has {max(longest, 0)}"
                f"{within}: lower these"
            )

    def update(self, loss: Tensor | float) -> bool:
        """Take the loss of the step that schedule.step() has just counted, on every rank of the schedule's group.

        Losses of dense steps are ignored, and so are calls between two applied steps (micro-batches, skipped steps):
        pass the mean over micro-batches. Captured and compiled steps may pass their static output: it is copied.

        Args:
            loss: One number. A tensor is not read before the interval ends; fp32 is enough.

        Returns:
            Whether the guard has tripped now.

        Raises:
            ConfigError: loss is not one number.
            ScheduleError: The guard has tripped in the run whose state was loaded, but the schedule has not ended its
                sparse phase: load the states of both.
            RankMismatchError: As SparseSchedule.end_sparse_phase.
        """
        loss = _checked(loss)
        state, step = self._state, self._schedule.applied_steps
        if state.tripped_at is not None:
            if self._schedule.ended_at is None:
                raise ScheduleError(
                    f"the guard tripped at step {state.tripped_at}, but the schedule's sparse phase did not end: load "
                    "the states of both, or start a new LossGuard"
                )
            return False
        if step == 0 or step == state.last_step:
            return False
        state.last_step = step
        since = sparse_since(self._schedule.phases, step - 1)
        if since != state.since:
            self._steps = []
            state.restart(since)
        if since is None or not self._is_in_reference(step):
            return False
        self._keep(step, loss)
        if len(self._steps) < self._interval:
            return False
        self._read()
        return state.above >= self._patience and self._trip()

    def _is_in_reference(self, step: int) -> bool:
        if self._reference is None:
            return True
        if step > self._reference.last and not self._said_end:
            self._said_end = True
            logger.warning(
                "the reference of the loss guard ends at step %d: later losses are not compared", self._reference.last
            )
        return self._reference.first <= step <= self._reference.last

    def _keep(self, step: int, loss: Tensor | float) -> None:
        """Copy the loss into the buffer, without synchronising."""
        if self._losses is None:
            device = loss.device if isinstance(loss, Tensor) else None
            self._losses = torch.zeros(self._interval, dtype=torch.float32, device=device)
        elif isinstance(loss, Tensor) and loss.device != self._losses.device:  # after loading a state
            self._losses = self._losses.to(loss.device)
        place = self._losses[len(self._steps)]
        if isinstance(loss, Tensor):
            place.copy_(loss.reshape(()))
        else:
            place.fill_(loss)
        self._steps.append(step)

    def _read(self) -> None:
        """Read the losses of an interval, and compare."""
        state, steps = self._state, self._steps
        assert self._losses is not None
        losses = mean_over_ranks(self._losses, self._schedule._group)
        self._steps = []
        finite = [(step, loss) for step, loss in zip(steps, losses, strict=True) if math.isfinite(loss)]
        state.not_finite += len(steps) - len(finite)
        if not finite:
            state.above += 1
            return
        decay = (1 - 1 / self._smoothing) ** self._interval
        state.loss.add(fmean(loss for _, loss in finite), decay)
        state.gap.add(fmean(loss - self._reference_at(step) for step, loss in finite), decay)
        if state.loss.count >= 2 and state.loss.count * self._interval >= self._smoothing:
            self._compare(steps[-1])

    def _reference_at(self, step: int) -> float:
        """The other run's loss, 0 without one."""
        loss = None if self._reference is None else self._reference.at(step)
        return 0.0 if loss is None else loss

    def _compare(self, step: int) -> None:
        state = self._state
        loss = state.loss.mean
        if self._reference is None:
            reference = loss if state.best is None else state.best
            state.best = min(reference, loss)
        else:
            reference = loss - state.gap.mean
        limit = reference + self._tolerance * abs(reference) + STANDARD_ERRORS * state.gap.standard_error
        state.above = state.above + 1 if loss > limit else 0
        state.comparisons += 1
        state.compared = (step, loss, reference, limit)

    def _trip(self) -> bool:
        """End the sparse phase, unless it has just ended by itself."""
        if self._schedule.phase != "sparse":
            return False
        self._schedule.end_sparse_phase()
        self._state.tripped_at = self._schedule.applied_steps
        logger.warning("the loss guard made the remaining steps dense: %s", self.report())
        return True

    def report(self) -> GuardReport:
        """The figures of the last comparison; does not synchronise."""
        state = self._state
        step, loss, reference, limit = state.compared or (None,) * 4
        return GuardReport(step, loss, reference, limit, state.above, state.not_finite, state.tripped_at)

    def state_dict(self) -> dict[str, Any]:
        """Settings, averages and the losses not read so far, as JSON values. Synchronises with the device.

        Losses that were not read are those of this rank: save it per rank, or in a step whose number in the sparse
        phase is a multiple of `interval`.
        """
        waiting = [] if self._losses is None else self._losses[: len(self._steps)].tolist()
        return {
            "settings": self._settings(),
            "progress": self._state.to_record(),
            "waiting": list(zip(self._steps, waiting, strict=True)),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where state was saved, bit for bit. Load the schedule's state, too.

        Raises:
            ScheduleError: state is of another kind, or of a guard with other settings or another reference; nothing is
                changed.
        """
        if not isinstance(state, dict) or state.keys() != {"settings", "progress", "waiting"}:
            raise ScheduleError("state is not that of a LossGuard; pass what state_dict() returned")
        if state["settings"] != self._settings():
            raise ScheduleError(
                f"state was saved with {state['settings']}, this guard has {self._settings()}; build it with the same"
            )
        progress = from_record(state["progress"])
        try:
            waiting = [(int(step), float(loss)) for step, loss in state["waiting"]]
        except (TypeError, ValueError) as error:
            raise ScheduleError(f"state['waiting'] must hold pairs of step and loss: {error}") from error
        if len(waiting) >= self._interval:
            raise ScheduleError(f"state['waiting'] holds {len(waiting)} losses; fewer than an interval wait")
        self._state, self._steps = progress, []
        for step, loss in waiting:
            self._keep(step, loss)

    def _settings(self) -> dict[str, Any]:
        return {
            "tolerance": self._tolerance,
            "smoothing": self._smoothing,
            "patience": self._patience,
            "interval": self._interval,
            "reference": None if self._reference is None else self._reference.digest(),
        }


def _checked(loss: object) -> Tensor | float:
    """One number; of a DTensor, the whole of it."""
    if isinstance(loss, Tensor) and loss.numel() == 1 and not loss.is_complex():
        whole = loss.detach()
        return whole.full_tensor() if hasattr(whole, "full_tensor") else whole
    if isinstance(loss, Real) and not isinstance(loss, bool):
        return float(loss)
    given = f"tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
    raise ConfigError(f"loss is a {given}; pass one number, such as the mean over micro-batches")
