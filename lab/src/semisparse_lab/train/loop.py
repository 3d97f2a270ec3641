"""The training loop that every run goes through, dense or sparse."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor, nn

from semisparse import SparseSchedule
from semisparse.errors import ConfigError
from semisparse.gemm.engine import engine
from semisparse_lab.tasks.task import Batch, Forward, Task
from semisparse_lab.train.capture import GraphedGradients
from semisparse_lab.train.config import Precision, TrainConfig, adamw, autocast, learning_rate, resolve_device
from semisparse_lab.train.measure import MaskCurves, MemoryMeter, StepClock, median_after_warm_up
from semisparse_lab.train.results import EpochRecord, Kind, PhaseSpan, RunResult


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run is, after each step.

    Attributes:
        name: The run.
        step: Optimizer steps tried so far.
        total_steps: Steps of the whole run.
        phase: Kind of the phase.
        record: The epoch's point of the curves at the end of an epoch, otherwise None.
    """

    name: str
    step: int
    total_steps: int
    phase: Kind
    record: EpochRecord | None = None


@contextmanager
def scoring(model: nn.Module, device: torch.device, precision: Precision) -> Iterator[None]:
    """Model in eval mode, no gradients, the precision that it trains in; model stays in eval mode afterwards."""
    model.eval()
    with torch.inference_mode(), autocast(device, precision):
        yield


def fit(
    model: nn.Module,
    task: Task,
    config: TrainConfig,
    schedule: SparseSchedule | None = None,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    name: str = "run",
    on_progress: Callable[[Progress], None] | None = None,
    wrap: Callable[[nn.Module], Forward] | None = None,
    graph: bool = False,
) -> RunResult:
    """Train model, already on config.device, for config.epochs and score it on the test split once.

    On a CPU equal arguments give equal numbers, bit for bit; on CUDA as far as the kernels are deterministic.

    Args:
        model: What is trained.
        task: What is learned.
        config: Settings of the training; its layers are not read here.
        schedule: Stepped after each optimizer step; None trains the model as it is.
        optimizer: Default adamw(model, config). Its learning rates are set here.
        name: For the result and on_progress.
        on_progress: Called after each step and at the end of each epoch.
        wrap: What the training forward goes through, for example torch.compile. Scores are taken on model itself.
        graph: Replay forward and backward from a CUDA graph (see GraphedGradients).

    Raises:
        ConfigError: The batch size does not fit, or a graph is asked for without CUDA or with fp16 (it cannot scale).
    """
    device = resolve_device(config.device)
    steps_per_epoch = task.steps_per_epoch(config.batch_size)
    total = config.epochs * steps_per_epoch
    forward, optimizer = model if wrap is None else wrap(model), optimizer or adamw(model, config)
    log = _Log(name, total, StepClock(device), MaskCurves(model, steps_per_epoch), on_progress)
    step = _Step(forward, task, config, schedule, optimizer, graph)
    order = torch.Generator().manual_seed(config.seed)
    memory, epochs = MemoryMeter(device), list[EpochRecord]()
    for _ in range(config.epochs):
        model.train()
        losses = _train_epoch(step, task.batches(config.batch_size, order), config, schedule, log)
        with scoring(model, device, config.precision):
            scores = task.validate(model)
        epochs.append(EpochRecord(len(log.kinds), losses.item() / steps_per_epoch, scores, *log.masks.take()))
        log.tell(epochs[-1])
    step.close()
    with scoring(model, device, config.precision):
        test = task.test(model)
    return RunResult(
        name=name,
        steps=total,
        skipped_steps=0 if schedule is None else total - schedule.applied_steps,
        epochs=tuple(epochs),
        phases=phase_spans(log.kinds, log.clock.seconds(), log.products),
        test=test,
        peak_memory=memory.peak(),
    )


@dataclass
class _Log:
    """What is noted of each step: its kind, seconds and sparse products, and the masks."""

    name: str
    total: int
    clock: StepClock
    masks: MaskCurves
    on_progress: Callable[[Progress], None] | None
    kinds: list[Kind] = field(default_factory=list)
    products: list[int] = field(default_factory=list)

    def tell(self, record: EpochRecord | None = None) -> None:
        if self.on_progress is not None:
            self.on_progress(Progress(self.name, len(self.kinds), self.total, self.kinds[-1], record))


def _train_epoch(
    step: "_Step", batches: Iterator[Batch], config: TrainConfig, schedule: SparseSchedule | None, log: _Log
) -> Tensor:
    """The sum of the batches' losses, on the device."""
    losses = torch.zeros((), device=resolve_device(config.device))
    for batch in batches:
        log.kinds.append("dense" if schedule is None else schedule.phase)
        log.clock.start()
        losses += step(batch, learning_rate(config, len(log.kinds) - 1, log.total), log.kinds[-1])
        log.clock.stop()
        log.products.append(step.products)
        log.masks.count(schedule)
        log.tell()
    return losses


class _Step:
    """One optimizer step, with gradient scaling for fp16; returns the detached loss, still on the device."""

    def __init__(
        self,
        forward: Forward,
        task: Task,
        config: TrainConfig,
        schedule: SparseSchedule | None,
        optimizer: torch.optim.Optimizer,
        graph: bool,
    ) -> None:
        self._forward, self._task, self._config = forward, task, config
        self._schedule, self._optimizer = schedule, optimizer
        self._device = resolve_device(config.device)
        if graph and (self._device.type != "cuda" or config.precision == "fp16"):
            raise ConfigError(
                f"graph=True needs device='cuda' and precision 'fp32' or 'bf16', not {config.precision!r} on "
                f"{config.device!r}; leave it out"
            )
        self._scaler = torch.amp.GradScaler(self._device.type, enabled=config.precision == "fp16")
        self._parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self._graphed = GraphedGradients(self._backward, self._parameters) if graph else None
        self.products = 0
        """Sparse products of the last step."""

    def __call__(self, batch: Batch, lr: float, kind: Kind) -> Tensor:
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        if self._graphed is not None:
            loss, self.products = self._graphed(batch, kind)
        else:
            before = engine().products
            self._optimizer.zero_grad(set_to_none=True)
            loss = self._backward(batch)
            self.products = engine().products - before
        if self._config.clip:
            self._scaler.unscale_(self._optimizer)
            nn.utils.clip_grad_norm_(self._parameters, self._config.clip)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        if self._schedule is not None:
            self._schedule.step(self._scaler)
        return loss

    def close(self) -> None:
        """Free what only steps need."""
        if self._graphed is not None:
            self._graphed.close()
            self._graphed = None

    def _backward(self, batch: Batch) -> Tensor:
        with autocast(self._device, self._config.precision):
            loss = self._task.loss(self._forward, batch)
        self._scaler.scale(loss).backward()
        return loss.detach()


def phase_spans(kinds: list[Kind], seconds: list[float], products: list[int]) -> tuple[PhaseSpan, ...]:
    """Stretches of equal kind, from the kind, the seconds and the sparse products of each step."""
    spans, start = [], 0
    for kind, steps in groupby(kinds):
        end = start + len(list(steps))
        spans.append(PhaseSpan(kind, start, end, median_after_warm_up(seconds[start:end]), sum(products[start:end])))
        start = end
    return tuple(spans)
