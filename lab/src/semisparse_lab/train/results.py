"""Results of one training run: curves, phases, scores and costs."""

import math
from dataclasses import dataclass
from typing import Literal

Kind = Literal["sparse", "dense"]
"""Kind of a phase."""


@dataclass(frozen=True, slots=True)
class Scores:
    """Scores of a model on one split.

    Attributes:
        loss: Mean loss.
        accuracy: Share of right predictions, from 0 to 1.
    """

    loss: float
    accuracy: float


@dataclass(frozen=True, slots=True)
class EpochRecord:
    """One point of the curves.

    Attributes:
        step: Optimizer steps tried so far.
        train_loss: Mean over the epoch's batches.
        validation: Scores on the validation split.
        flip_rate: Mean flip rate of all followed layers (see MaskMetrics) in one step near the end of the epoch; None
            if none was measured.
        kept_magnitude: Share of the weights' magnitude that their masks keep at that step, the mean over these layers.
    """

    step: int
    train_loss: float
    validation: Scores
    flip_rate: float | None = None
    kept_magnitude: float | None = None


@dataclass(frozen=True, slots=True)
class PhaseSpan:
    """Consecutive steps of one kind.

    Attributes:
        kind: Kind of the steps.
        start: The first step.
        end: The step after the last one.
        seconds_per_step: Median after warm-up; None if untimed.
        sparse_products: Products on sparse tensor cores in these training steps; 0 if all were dense or masked dense.
    """

    kind: Kind
    start: int
    end: int
    seconds_per_step: float | None
    sparse_products: int = 0


@dataclass(frozen=True, slots=True)
class PeakMemory:
    """Peak memory of a run.

    Attributes:
        bytes: Highest use during the run; None if it cannot be read.
        kind: What was counted.
    """

    bytes: int | None
    kind: str


@dataclass(frozen=True, slots=True)
class RunResult:
    """One finished run.

    Attributes:
        name: Of the row.
        steps: Optimizer steps tried.
        skipped_steps: Those that a gradient scaler skipped.
        epochs: Points of the curves; each was scored with the layers as they were then, sparse or dense.
        phases: In order.
        test: Scores on the test split, taken once, after the last step, in the last phase.
        peak_memory: Of the run.
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

        A gradient scaler skips steps with such losses while it searches for a scale. If it skipped any, only the
        training loss of the last epoch counts.
        """
        counted = self.epochs[-1:] if self.skipped_steps else self.epochs
        losses = [self.test.loss, *(record.validation.loss for record in self.epochs)]
        return not all(map(math.isfinite, (*losses, *(record.train_loss for record in counted))))
