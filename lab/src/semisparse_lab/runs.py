"""The demo's three runs: dense, sparse then dense, fully sparse. One code path; only the sparse fraction differs."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from torch import nn

from semisparse import SparseSchedule, SwapReport, densify, sparsify
from semisparse.config import SparseConfig
from semisparse.errors import ConfigError, NoLayerMatchedError
from semisparse.schedule.phases import share_of
from semisparse_lab.models.vit import VisionTransformer, ViTConfig, build_model
from semisparse_lab.tasks.task import Forward, Task
from semisparse_lab.train.config import TrainConfig, resolve_device
from semisparse_lab.train.loop import Progress, fit
from semisparse_lab.train.results import RunResult

EXCLUDE = ("patch_embed", "head")
"""First and last layer stay dense, as is usual in sparse training: they are small and sensitive."""


@dataclass(frozen=True, slots=True)
class RunPlan:
    """One row of the table. slug: for file names; sparse_fraction: share of the steps that are sparse."""

    name: str
    slug: str
    sparse_fraction: float


@dataclass(frozen=True, slots=True)
class FinishedRun:
    """A run and its model, made of plain nn.Linear again.

    weights: "masked" when the run ended sparse, so that the plain model computes what was scored; else "dense".
    """

    plan: RunPlan
    result: RunResult
    model: VisionTransformer
    weights: Literal["dense", "masked"]


def three_runs(sparse_fraction: float) -> tuple[RunPlan, ...]:
    """Dense, sparse then dense, fully sparse. Raises ConfigError unless 0 < sparse_fraction < 1."""
    if not 0 < sparse_fraction < 1:
        raise ConfigError(
            f"sparse_fraction={sparse_fraction!r} must lie between 0 and 1, both excluded: "
            "the dense and the fully sparse run are trained in any case"
        )
    return (
        RunPlan("dense", "dense", 0.0),
        RunPlan(f"sparse then dense ({100 * sparse_fraction:g} %)", "sparse-then-dense", sparse_fraction),
        RunPlan("fully sparse", "fully-sparse", 1.0),
    )


def check_phases(sparse_fraction: float, steps: int) -> None:
    """Raise ConfigError where the middle one of three_runs would, in whole steps, be one of the other two."""
    sparse = share_of(steps, sparse_fraction, "sparse_fraction")
    if not 0 < sparse < steps:
        raise ConfigError(
            f"sparse_fraction={sparse_fraction!r} of {steps} steps is {sparse} steps, so that one of both phases would "
            "have none; train longer or choose another fraction"
        )


def sparsify_model(model: nn.Module, layers: str, sparse: SparseConfig | None = None) -> SwapReport:
    """Make the layers that `layers` selects semi-sparse, except EXCLUDE. Raises NoLayerMatchedError."""
    try:
        return sparsify(model, sparse, select=layers, exclude=EXCLUDE)
    except NoLayerMatchedError as error:
        raise NoLayerMatchedError(f"layers={layers!r}: {error}") from error


def train_run(
    plan: RunPlan,
    model_config: ViTConfig,
    task: Task,
    config: TrainConfig,
    *,
    sparse: SparseConfig | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    wrap: Callable[[nn.Module], Forward] | None = None,
) -> FinishedRun:
    """Build the model from config.seed, train it as plan says, score it, and make it dense again.

    The dense run goes through the same steps with the same swapped layers, which are then exactly nn.Linear. sparse:
    how the layers are sparse, default SparseConfig(); on_progress and wrap as in fit. Raises as sparsify_model and fit.
    """
    config = replace(config, sparse_fraction=plan.sparse_fraction)
    model = build_model(model_config, config.seed, resolve_device(config.device))
    sparsify_model(model, config.layers, sparse)
    steps = config.epochs * task.steps_per_epoch(config.batch_size)
    schedule = SparseSchedule.sparse_then_dense(model, steps, config.sparse_fraction)
    result = fit(model, task, config, schedule, name=plan.name, on_progress=on_progress, wrap=wrap)
    weights: Literal["dense", "masked"] = "masked" if schedule.phase == "sparse" else "dense"
    densify(model, weights=weights)
    return FinishedRun(plan, result, model, weights)
