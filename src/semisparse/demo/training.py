"""The training loop that every run of the demo and the examples goes through, dense or sparse."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from semisparse.demo.capture import GraphedGradients
from semisparse.demo.checks import check_counts, check_ranges
from semisparse.demo.measure import MaskCurves, MemoryMeter, StepClock, median_after_warm_up
from semisparse.demo.results import EpochRecord, PhaseSpan, RunResult
from semisparse.demo.task import Batch, Forward, Task
from semisparse.errors import ConfigError
from semisparse.gemm.engine import engine
from semisparse.schedule import Kind, SparseSchedule

Precision = Literal["fp32", "bf16", "fp16"]
_AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Settings of a run. Immutable, checked when it is built.

    epochs; batch_size: samples a step; lr: peak learning rate; warmup_fraction: share of the steps over which it rises
    from 0; hold_fraction: share of the steps over which it then stays, before a cosine to 0; weight_decay: of tensors
    with 2 or more dimensions; betas: Adam's; clip: largest norm of all gradients together, 0 for any; sparse_fraction:
    share of the steps that are sparse, from the start; layers: which linear layers are sparse, as sparsify's select;
    seed: of initial weights, data order and augmentation; device: "auto", "cpu", "cuda" or "cuda:<i>"; precision:
    "fp32", or autocast to "bf16" or "fp16" (the latter with gradient scaling) over fp32 weights.
    Raises ConfigError, naming the setting.
    """

    epochs: int = 40
    batch_size: int = 64
    lr: float = 6e-3
    warmup_fraction: float = 0.1
    hold_fraction: float = 0.0
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = 0.0
    sparse_fraction: float = 0.7
    layers: str = "mlp"
    seed: int = 0
    device: str = "cpu"
    precision: Precision = "fp32"

    def __post_init__(self) -> None:
        check_counts(self, ("epochs", "batch_size"))
        check_counts(self, ("seed",), least=0)
        check_ranges(self, ("warmup_fraction", "sparse_fraction"))
        check_ranges(self, ("hold_fraction",), high=1 - self.warmup_fraction)
        check_ranges(self, ("weight_decay", "clip"), high=math.inf)
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"betas={self.betas!r} must be two numbers, 0 or more and less than 1")
        if not 0 < self.lr < math.inf:
            raise ConfigError(f"lr={self.lr!r} must be a positive number")
        if self.precision not in get_args(Precision):
            choices = ", ".join(map(repr, get_args(Precision)))
            raise ConfigError(f"precision={self.precision!r} is not one of {choices}")
        resolve_device(self.device)


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run is, after each step. record is set at the end of an epoch only."""

    name: str
    step: int
    total_steps: int
    phase: Kind
    record: EpochRecord | None = None


def resolve_device(name: str) -> torch.device:
    """The device called name; "auto" is CUDA where there is one, else the CPU. Raises ConfigError if it is absent."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device={name!r} is no device; use 'auto', 'cpu' or 'cuda'") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device={name!r} is not supported; use 'auto', 'cpu' or 'cuda'")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device={name!r}: torch sees {torch.cuda.device_count()} CUDA devices; use 'cpu'")
    return device


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """Autocast to precision; off for fp32."""
    return torch.autocast(device.type, dtype=_AUTOCAST_DTYPES.get(precision), enabled=precision != "fp32")


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

    schedule: stepped after each optimizer step; None trains the model as it is. optimizer: default adamw(model,
    config); its learning rates are set here, by learning_rate. name: for the result and on_progress, which is called
    after each step. wrap: what the training forward goes through instead of model itself (torch.compile, say); scores
    are taken on model. graph: replay forward and backward from a CUDA graph (see GraphedGradients).
    config.sparse_fraction and config.layers are not read here. On a CPU equal arguments give equal numbers, bit for
    bit; on CUDA as far as the kernels are deterministic. Raises ConfigError when the batch size does not fit, and for
    a graph without CUDA or with fp16, whose gradient scaling it does not have.
    """
    device = resolve_device(config.device)
    steps_per_epoch = task.steps_per_epoch(config.batch_size)
    total = config.epochs * steps_per_epoch
    masks = MaskCurves(model, steps_per_epoch)
    forward, optimizer = model if wrap is None else wrap(model), optimizer or adamw(model, config)
    step = _Step(forward, task, config, schedule, optimizer, graph)
    order = torch.Generator().manual_seed(config.seed)
    memory, clock, kinds, epochs = MemoryMeter(device), StepClock(device), list[Kind](), list[EpochRecord]()
    products = list[int]()
    report = on_progress or (lambda progress: None)
    for _ in range(config.epochs):
        model.train()
        losses = torch.zeros((), device=device)
        begin = len(kinds)
        for batch in task.batches(config.batch_size, order):
            kinds.append("dense" if schedule is None else schedule.phase)
            clock.start()
            losses += step(batch, learning_rate(config, len(kinds) - 1, total), kinds[-1])
            clock.stop()
            products.append(step.products)
            masks.count(schedule)
            report(Progress(name, len(kinds), total, kinds[-1]))
        with scoring(model, device, config.precision):
            scores = task.validate(model)
        epochs.append(EpochRecord(len(kinds), losses.item() / (len(kinds) - begin), scores, *masks.take()))
        report(Progress(name, len(kinds), total, kinds[-1], epochs[-1]))
    step.close()
    with scoring(model, device, config.precision):
        test = task.test(model)
    return RunResult(
        name=name,
        steps=total,
        skipped_steps=0 if schedule is None else total - schedule.applied_steps,
        epochs=tuple(epochs),
        phases=phase_spans(kinds, clock.seconds(), products),
        test=test,
        peak_memory=memory.peak(),
    )


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


def learning_rate(config: TrainConfig, step: int, total: int) -> float:
    """Linear warm-up to config.lr, which is held, then half a cosine that would reach 0 at step total."""
    warmup = round(config.warmup_fraction * total)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    held = warmup + round(config.hold_fraction * total)
    return config.lr * 0.5 * (1 + math.cos(math.pi * max(0, step - held) / max(1, total - held)))


def phase_spans(kinds: list[Kind], seconds: list[float], products: list[int]) -> tuple[PhaseSpan, ...]:
    """Stretches of equal kind, from the kind, the seconds and the sparse products of each step."""
    spans, start = [], 0
    for kind, steps in groupby(kinds):
        end = start + len(list(steps))
        spans.append(PhaseSpan(kind, start, end, median_after_warm_up(seconds[start:end]), sum(products[start:end])))
        start = end
    return tuple(spans)


def adamw(
    model: nn.Module, config: TrainConfig, kind: type[torch.optim.AdamW] = torch.optim.AdamW
) -> torch.optim.AdamW:
    """The optimizer of a run; kind: AdamW or a subclass, StepAdamW say. Weight decay only where config says."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    # A subclass may have no fused form; torch then chooses the best of the others.
    fused = True if kind is torch.optim.AdamW and resolve_device(config.device).type == "cuda" else None
    return kind(groups, lr=config.lr, betas=config.betas, fused=fused)
