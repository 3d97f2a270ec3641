"""Time to loss: a Llama-style decoder on the Linux kernel's source, wide enough that 2:4 and fp8 gain speed.

All arms take one code path: the same initial weights and batches per seed, the same compiled training step, optimizer
and learning rates. They differ in how the linear layers of the blocks compute. No byte is seen twice.
"""

import gc
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from semisparse import SparseSchedule, sparsify
from semisparse.errors import ConfigError
from semisparse.recipes import Recipe, RecipeSchedule, fastest, safest
from semisparse.stopwatch import Stopwatch
from semisparse_lab.checks import check_counts, check_ranges
from semisparse_lab.data.tokens import TokenSets
from semisparse_lab.models.llama import LlamaConfig, build_llama
from semisparse_lab.tasks.next_token import NextToken, TextScore, next_token_loss
from semisparse_lab.train.config import TrainConfig, adamw, autocast, resolve_device
from semisparse_lab.train.float8 import converted
from semisparse_lab.train.measure import MemoryMeter
from semisparse_lab.train.results import PeakMemory
from semisparse_lab.train.timed import Loss, Plan, TimedRun, Watch, train_timed

NAME = "llama-linux"
TITLE = "Llama-style 4096/11008 on the source of Linux: loss against tokens and against seconds"
Budget = Literal["tokens", "seconds"]
"""What all arms have in equal parts: with "seconds" a run has as many steps as fit the seconds of the first arm's."""


@dataclass(frozen=True, slots=True)
class Arm:
    """One way in which the linear layers of the blocks compute.

    Attributes:
        slug: Short name for files.
        title: Name for tables.
        recipe: Of semisparse; None for plain nn.Linear.
        float8: Whether torchao converts the layers.
    """

    slug: str
    title: str
    recipe: Recipe | None = None
    float8: bool = False


def arms(sparse_fraction: float = 0.7, refresh_every: int = 1) -> tuple[Arm, ...]:
    """The arms, the one that the others are compared with first.

    Args:
        sparse_fraction: Share of the steps that are 2:4.
        refresh_every: As Recipe's.
    """
    share = f"{sparse_fraction:.0%} of the steps"
    fp8 = fastest(sparse_fraction=sparse_fraction, grad_output=None)
    found = (
        Arm("bf16", "dense bf16"),
        Arm("float8", "torchao float8", float8=True),
        Arm("fp8-24", f"fp8 + 2:4 for {share}, then fp8", fp8),
        Arm("bf16-24", f"2:4 for {share}, then dense", safest(sparse_fraction=sparse_fraction)),
        Arm("fp8-24-mvue", f"fp8 + 2:4 + mvue for {share}, then fp8", fastest(sparse_fraction=sparse_fraction)),
    )
    return tuple(
        arm if arm.recipe is None else replace(arm, recipe=replace(arm.recipe, refresh_every=refresh_every))
        for arm in found
    )


def chosen_arms(slugs: str, sparse_fraction: float = 0.7, refresh_every: int = 1) -> list[Arm]:
    """The arms with these slugs, in their order; all for an empty text.

    Args:
        slugs: With commas between them.
        sparse_fraction: As arms'.
        refresh_every: As arms'.

    Raises:
        ConfigError: A slug belongs to none, or comes twice.
    """
    known = {arm.slug: arm for arm in arms(sparse_fraction, refresh_every)}
    names = [name.strip() for name in slugs.split(",")] if slugs else list(known)
    for name in names:
        if name not in known or names.count(name) > 1:
            raise ConfigError(f"arms={slugs!r} must name each of {', '.join(known)} once at most")
    return [known[name] for name in names]


def numbers(seeds: str) -> list[int]:
    """Seeds from a text with commas between them.

    Args:
        seeds: Whole numbers, each once.

    Raises:
        ConfigError: It is something else.
    """
    found = [int(seed) if seed.strip().isdecimal() else -1 for seed in seeds.split(",")]
    if min(found) < 0 or len(set(found)) < len(found):
        raise ConfigError(f"seeds={seeds!r} must be whole numbers with commas between them, each once")
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What all arms share.

    Args:
        model: Sizes.
        train: Learning rate and its course, optimizer, device, precision; batch_size windows per step; layers is the
            pattern of the linear layers that the arms differ in.
        steps: Of the first arm, and of every arm with budget "tokens".
        sparse_fraction: As arms'.
        refresh_every: As arms'.
        dense_start: Share of the steps that are dense before the sparse ones; not with refresh_every.
        scores: Number of scores on the way of a run, about.
        score_windows: Windows of each of them.
        final_windows: Windows of the scores at the end, on the validation set and on the test set.
        compiled: Whether the training step is compiled.
    """

    model: LlamaConfig = field(default_factory=LlamaConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    steps: int = 2500
    sparse_fraction: float = 0.7
    refresh_every: int = 1
    dense_start: float = 0.0
    scores: int = 30
    score_windows: int = 128
    final_windows: int = 512
    compiled: bool = True

    def __post_init__(self) -> None:
        check_counts(self, ("steps", "refresh_every", "scores", "score_windows", "final_windows"))
        check_ranges(self, ("sparse_fraction",))
        check_ranges(self, ("dense_start",), high=1 - self.sparse_fraction)
        if self.dense_start and self.refresh_every > 1:
            raise ConfigError(f"dense_start={self.dense_start} and refresh_every={self.refresh_every}: choose one")

    def document(self, tokens: TokenSets) -> dict[str, Any]:
        """All of it but the seed, and the checksum of the text, as plain JSON values."""
        train = {name: value for name, value in asdict(self.train).items() if name not in ("seed", "epochs")}
        kept = {name: value for name, value in asdict(self).items() if name != "train"}
        return {**kept, "train": {**train, "betas": list(self.train.betas)}, "text": tokens.sha256}

    def plan(self, steps: int) -> Plan:
        """The plan of a run of so many steps."""
        every = max(1, steps // self.scores)
        return Plan(steps=steps, score_every=every, curve_every=min(10, every))


def settings(
    device: str = "auto",
    *,
    small: bool = False,
    steps: int | None = None,
    lr: float = 1.4e-4,
    hold: float = 0.67,
    layers: str = "blocks",
    **changes: Any,
) -> Settings:
    """The settings of the study.

    Args:
        device: As in TrainConfig.
        small: A tiny model, to see it work.
        steps: As Settings'.
        lr: Peak learning rate.
        hold: Share of the steps that it stays there after the warm-up, before half a cosine.
        layers: As TrainConfig's.
        changes: Of Settings.

    Raises:
        ConfigError: A setting is outside its range.
    """
    place = resolve_device(device)
    train = TrainConfig(
        epochs=1,
        batch_size=2 if small else 8,
        lr=lr,
        warmup_fraction=0.03,
        hold_fraction=hold,
        weight_decay=0.1,
        betas=(0.9, 0.95),
        clip=1.0,
        layers=layers,
        device=str(place),
        precision="bf16" if place.type == "cuda" else "fp32",
    )
    tiny = LlamaConfig(context=16, width=32, hidden=64, depth=1, heads=2)  # the vocabulary is that of the prepared text
    sizes: dict[str, Any] = {} if steps is None else {"steps": steps}
    if small:
        sizes = {"model": tiny, "steps": 20, "scores": 5, "score_windows": 4, "final_windows": 8, **sizes}
    return Settings(train=train, compiled=place.type == "cuda", **sizes, **changes)


@dataclass(frozen=True, slots=True)
class Ended:
    """What a run gave.

    Attributes:
        run: Curve, scores on the way, times.
        validation: Score on the validation set at the end; None if the run did not finish.
        test: The same on the test set, which is read here alone.
        final_seconds: Of these two scores.
        peak_memory: Of the run.
        parameters: Of the model.
    """

    run: TimedRun
    validation: TextScore | None
    test: TextScore | None
    final_seconds: float
    peak_memory: PeakMemory
    parameters: int


def train_arm(
    arm: Arm, seed: int, chosen: Settings, tokens: TokenSets, steps: int, watch: Watch = lambda run: True
) -> Ended:
    """Train one arm with one seed, and score it at the end.

    Args:
        arm: How layers compute.
        seed: Of initial weights, order of the batches and sampled gradients.
        chosen: The settings.
        tokens: The text, on chosen's device; the model's vocabulary is at least as large.
        steps: Of this run.
        watch: As train_timed's.

    Raises:
        ConfigError: The text is too short or has too many tokens, or torchao is missing.
    """
    config = replace(chosen.train, seed=seed)
    device = resolve_device(config.device)
    if tokens.vocabulary > chosen.model.vocabulary:
        raise ConfigError(
            f"vocabulary={chosen.model.vocabulary} of the model is less than the text's {tokens.vocabulary}"
        )
    gc.collect()
    torch.compiler.reset()  # arms must not share what an earlier one has compiled
    memory = MemoryMeter(device)
    task = NextToken(tokens, chosen.model.context, config.batch_size)
    model = build_llama(chosen.model, seed, device)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if arm.float8:
        converted(model, linears(model, config.layers), emulate=device.type == "cpu")
    if arm.recipe is not None:
        sparsify(model, arm.recipe.config, select=config.layers)
    optimizer = adamw(model, config)
    schedule = None if arm.recipe is None else _schedule(arm.recipe, model, optimizer, steps, chosen, seed)
    batches = task.batches(steps, torch.Generator().manual_seed(seed))
    run = train_timed(
        model,
        _loss(model, chosen.compiled),
        batches,
        lambda: task.score(model, "validation", chosen.score_windows),
        optimizer,
        config,
        chosen.plan(steps),
        schedule,
        watch,
    )
    elapsed, scores = Stopwatch(), dict.fromkeys(("validation", "test"))
    if run.finished:
        model.eval()
        with torch.no_grad(), autocast(device, config.precision):
            scores = {part: task.score(model, part, chosen.final_windows) for part in scores}
    return Ended(run, scores["validation"], scores["test"], elapsed(), memory.peak(), parameters)


def linears(model: nn.Module, pattern: str) -> list[str]:
    """Names of the linear layers that contain pattern."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and pattern in name]


def _schedule(
    recipe: Recipe, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, chosen: Settings, seed: int
) -> SparseSchedule:
    """The recipe's schedule; with a dense start one of the same layers and masks."""
    if chosen.dense_start:
        return SparseSchedule.dense_sparse_dense(model, steps, chosen.dense_start, recipe.sparse_fraction, seed=seed)
    return RecipeSchedule(recipe, model, optimizer, steps, seed=seed)


def _loss(model: nn.Module, compiled: bool) -> Loss:
    """The loss of a batch, compiled as one graph where asked for."""

    def loss(inputs: Tensor, targets: Tensor) -> Tensor:
        return next_token_loss(model, inputs, targets)

    return torch.compile(loss, fullgraph=True, dynamic=False) if compiled else loss
