"""What one training run leaves behind: curves, phases, scores and costs."""

import math
from dataclasses import dataclass
from typing import Literal

Kind = Literal["sparse", "dense"]
"""Of a phase."""


@dataclass(frozen=True, slots=True)
class Scores:
    """Mean loss and accuracy (share from 0 to 1) over one split."""

    loss: float
    accuracy: float


@dataclass(frozen=True, slots=True)
class EpochRecord:
    """One point of the curves.

    step: optimizer steps tried so far; train_loss: mean over the epoch's batches; flip_rate: mean flip rate of all
    followed layers (see MaskMetrics) in one step near the end of the epoch, None where none was measured;
    kept_magnitude: share of the weights' magnitude that their masks keep at that step, the mean over these layers.
    """

    step: int
    train_loss: float
    validation: Scores
    flip_rate: float | None = None
    kept_magnitude: float | None = None


@dataclass(frozen=True, slots=True)
class PhaseSpan:
    """Steps start (included) to end (excluded) of one kind.

    seconds_per_step: median after warm-up, None if untimed. sparse_products: products on sparse tensor cores that its
    training steps ran, 0 where all were dense or masked dense.
    """

    kind: Kind
    start: int
    end: int
    seconds_per_step: float | None
    sparse_products: int = 0


@dataclass(frozen=True, slots=True)
class PeakMemory:
    """bytes: highest use during the run, None where it cannot be read; kind: what was counted."""

    bytes: int | None
    kind: str


@dataclass(frozen=True, slots=True)
class RunResult:
    """One finished run.

    steps: optimizer steps tried; skipped_steps: those that a gradient scaler skipped. validation and test scores were
    taken with the layers as they were in the last phase, the test split only once, after the last step.
    """

    name: str
    steps: int
    skipped_steps: int
    epochs: tuple[EpochRecord, ...]
    phases: tuple[PhaseSpan, ...]
    test: Scores
    peak_memory: PeakMemory

    @property
    def seconds_per_step(self) -> float | None:
        """Median seconds per step after warm-up; of several phases the mean of their medians, weighted by steps."""
        timed = [(phase.end - phase.start, phase.seconds_per_step) for phase in self.phases]
        known = [(steps, seconds) for steps, seconds in timed if seconds is not None]
        return sum(steps * seconds for steps, seconds in known) / sum(steps for steps, _ in known) if known else None

    @property
    def diverged(self) -> bool:
        """Whether a loss was not finite, so that the scores mean nothing.

        Where a gradient scaler skipped steps, which it does for such losses while it looks for a scale, only the last
        epoch's training loss counts.
        """
        counted = self.epochs[-1:] if self.skipped_steps else self.epochs
        losses = [self.test.loss, *(record.validation.loss for record in self.epochs)]
        return not all(map(math.isfinite, (*losses, *(record.train_loss for record in counted))))
