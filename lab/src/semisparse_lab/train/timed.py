"""A training loop that is timed: loss against tokens and against seconds of pure training, which may stop early.

Nothing in it waits for a GPU but every `score_every` steps, when the model is scored.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from semisparse import SparseSchedule
from semisparse.gemm.engine import engine
from semisparse.stopwatch import Stopwatch
from semisparse_lab.tasks.next_token import TextScore
from semisparse_lab.tasks.task import Batch
from semisparse_lab.train.config import TrainConfig, autocast, learning_rate, resolve_device
from semisparse_lab.train.loop import phase_spans
from semisparse_lab.train.measure import WARM_UP_STEPS, StepClock
from semisparse_lab.train.results import Kind, PhaseSpan

Loss = Callable[[Tensor, Tensor], Tensor]
"""Mean loss of (inputs, targets), usually compiled."""


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """One point of the training curve.

    Attributes:
        step: Steps done.
        seconds: Of pure training so far (see TimedRun).
        loss: Mean over the steps since the last point, nats per token.
    """

    step: int
    seconds: float
    loss: float


@dataclass(frozen=True, slots=True)
class ScoredPoint:
    """One score on the validation set.

    Attributes:
        step: Steps done.
        seconds: Of pure training so far.
        score: With the layers as they were then, sparse or dense.
    """

    step: int
    seconds: float
    score: TextScore


@dataclass(frozen=True, slots=True)
class TimedRun:
    """What a timed loop has done.

    Pure training is the batch, forward, backward, clipping, optimizer and schedule, by CUDA events. The first steps of
    each phase compile and time kernels. They count as the median of the other steps of their phase; what they took
    beyond it is in start_seconds.

    Attributes:
        curve: The training curve.
        scores: Scores on the way, the last one at the end.
        phases: In order.
        seconds: Of pure training.
        start_seconds: By phase, what its first steps took beyond the median.
        score_seconds: Of all scores on the way.
        finished: Whether all steps were done.
    """

    curve: tuple[CurvePoint, ...]
    scores: tuple[ScoredPoint, ...]
    phases: tuple[PhaseSpan, ...]
    seconds: float
    start_seconds: tuple[float, ...]
    score_seconds: float
    finished: bool


class Watch(Protocol):
    """What is told of a run on its way."""

    def __call__(self, run: TimedRun) -> bool:
        """The run so far, after each score; whether to go on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """How long a loop runs, and how often it is looked at.

    Args:
        steps: Optimizer steps.
        score_every: Steps between scores.
        curve_every: Steps of which a point of the curve is the mean.
    """

    steps: int
    score_every: int = 150
    curve_every: int = 10


@dataclass
class _Log:
    """What is noted of each step."""

    losses: Tensor
    clock: StepClock
    kinds: list[Kind] = field(default_factory=list)
    products: list[int] = field(default_factory=list)
    scored: list[tuple[int, TextScore]] = field(default_factory=list)
    score_seconds: float = 0.0

    def run(self, plan: Plan) -> TimedRun:
        """Everything so far."""
        measured = self.clock.seconds()
        phases = phase_spans(self.kinds, measured, self.products)
        training, start_seconds = without_starts(measured, phases)
        until = [0.0]
        for seconds in training:
            until.append(until[-1] + seconds)
        losses, every = self.losses[: len(training)].tolist(), plan.curve_every
        curve = tuple(
            CurvePoint(end, until[end], statistics.fmean(losses[end - every : end]))
            for end in range(every, len(losses) + 1, every)
        )
        scores = tuple(ScoredPoint(step, until[step], score) for step, score in self.scored)
        finished = len(training) == plan.steps
        return TimedRun(curve, scores, phases, until[-1], start_seconds, self.score_seconds, finished)


def without_starts(measured: list[float], phases: tuple[PhaseSpan, ...]) -> tuple[list[float], tuple[float, ...]]:
    """Seconds of each step with the first WARM_UP_STEPS of each phase at its median, and what they took beyond it.

    Args:
        measured: Seconds of each step.
        phases: Their phases, whose medians leave these steps out.
    """
    counted, starts = list(measured), []
    for phase in phases:
        first = range(phase.start, min(phase.start + WARM_UP_STEPS, phase.end))
        median = phase.seconds_per_step or 0.0
        starts.append(sum(measured[step] - median for step in first))
        for step in first:
            counted[step] = median
    return counted, tuple(starts)


def train_timed(
    model: nn.Module,
    loss: Loss,
    batches: Iterator[Batch],
    score: Callable[[], TextScore],
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    plan: Plan,
    schedule: SparseSchedule | None = None,
    watch: Watch = lambda run: True,
) -> TimedRun:
    """Train model for plan.steps, or until watch says no.

    Args:
        model: On config.device, in the state that it is trained in.
        loss: Of a batch; runs under autocast to config.precision, which must not be fp16.
        batches: One for each step.
        score: Scores the model on the validation set; runs in eval mode without gradients.
        optimizer: Its learning rates are set here.
        config: Learning rate, its course, clipping, device and precision.
        plan: Steps and points.
        schedule: Stepped after each optimizer step; None trains the model as it is.
        watch: As Watch.
    """
    device = resolve_device(config.device)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    log = _Log(torch.zeros(plan.steps, device=device), StepClock(device))
    model.train()
    run = log.run(plan)
    for step in range(plan.steps):
        log.kinds.append("dense" if schedule is None else schedule.phase)
        log.clock.start()
        before = engine().products
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step, plan.steps)
        inputs, targets = next(batches)
        optimizer.zero_grad(set_to_none=True)
        with autocast(device, config.precision):
            value = loss(inputs, targets)
        value.backward()
        if config.clip:
            nn.utils.clip_grad_norm_(parameters, config.clip)
        optimizer.step()
        if schedule is not None:
            schedule.step()
        log.losses[step] = value.detach()
        log.clock.stop()
        log.products.append(engine().products - before)
        if (step + 1) % plan.score_every == 0 or step + 1 == plan.steps:
            _score(model, score, config, log, device)
            run = log.run(plan)
            if not watch(run):
                break
    return run


def _score(
    model: nn.Module, score: Callable[[], TextScore], config: TrainConfig, log: _Log, device: torch.device
) -> None:
    """Score the model as it is, which is timed apart."""
    log.clock.seconds()  # waits for the steps before
    elapsed = Stopwatch(time.perf_counter)
    model.eval()
    with torch.no_grad(), autocast(device, config.precision):
        log.scored.append((len(log.kinds), score()))
    model.train()
    log.score_seconds += elapsed()
