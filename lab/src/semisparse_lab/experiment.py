"""What an experiment is: rows, each a recipe, that train the same task; and the one way in which a row is trained."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import nn

from semisparse import SparseConfig, SwapReport, densify, sparsify
from semisparse.errors import ConfigError, EngineError, NoLayerMatchedError
from semisparse.recipes import Recipe, RecipeSchedule, StepAdamW
from semisparse_lab.tasks.task import Forward, Task
from semisparse_lab.train.config import TrainConfig, adamw
from semisparse_lab.train.loop import Progress, fit
from semisparse_lab.train.results import RunResult

OnProgress = Callable[[Progress], None]
ProgressFor = Callable[[str], AbstractContextManager[OnProgress]]
"""Called with a run's name; its context gives that run's on_progress."""

Backend = Literal["auto", "cusparselt"]
"""Backend of the rows of an experiment (see SparseConfig): "cusparselt" on a GPU, "auto" elsewhere."""

EXCLUDE = ("patch_embed", "head")
"""First and last layer stay dense, as is usual in sparse training: they are small and sensitive."""


@dataclass(frozen=True, slots=True)
class Row:
    """One configuration.

    Attributes:
        slug: Short name for file names.
        title: Name for tables.
        recipe: How it trains.
    """

    slug: str
    title: str
    recipe: Recipe


@dataclass(frozen=True, slots=True)
class Outcome:
    """What training one row with one seed gave.

    Attributes:
        value: The experiment's metric on the test split.
        result: The run.
        more: Further figures of the run, plain JSON values.
    """

    value: float
    result: RunResult
    more: dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Experiment:
    """What is compared, and how a run of it is trained.

    Args:
        name: For file names.
        title: For tables and plots.
        metric: What Outcome.value is.
        higher_is_better: Of the metric.
        rows: The configurations; the others are compared with the first one.
        settings: All that decides a result besides row and seed, plain JSON values.
        command: How a reader remakes the results.
        train: Trains one row with one seed, and tells its progress.
    """

    name: str
    title: str
    metric: str
    higher_is_better: bool
    rows: tuple[Row, ...]
    settings: dict[str, Any]
    command: str
    train: Callable[[Row, int, OnProgress], Outcome]

    def chosen(self, slugs: Iterable[str]) -> tuple[Row, ...]:
        """The rows with these slugs; without slugs, all rows.

        Args:
            slugs: Short names of rows.

        Raises:
            ConfigError: A slug belongs to none of the rows.
        """
        wanted = list(slugs)
        known = [row.slug for row in self.rows]
        for slug in wanted:
            if slug not in known:
                raise ConfigError(f"row={slug!r} is not one of {', '.join(map(repr, known))}")
        return tuple(row for row in self.rows if not wanted or row.slug in wanted)


@dataclass(frozen=True, slots=True)
class Trained:
    """A finished run, whose model has plain nn.Linear layers again.

    Attributes:
        result: Of the run.
        weights: What the model holds: "masked" if the run ended sparse, so that it computes what was scored; otherwise
            "dense".
    """

    result: RunResult
    weights: Literal["dense", "masked"]


def sparsify_model(model: nn.Module, layers: str, sparse: SparseConfig | None = None) -> SwapReport:
    """Make layers of a model semi-sparse, in place, except those in EXCLUDE.

    Args:
        model: The model to change.
        layers: Pattern of the layers' names, as sparsify's select.
        sparse: As in sparsify.

    Returns:
        The report of sparsify.

    Raises:
        NoLayerMatchedError: No layer of model would change.
    """
    try:
        return sparsify(model, sparse, select=layers, exclude=EXCLUDE)
    except NoLayerMatchedError as error:
        raise NoLayerMatchedError(f"layers={layers!r}: {error}") from error


def train_row(
    row: Row,
    model: nn.Module,
    task: Task,
    config: TrainConfig,
    *,
    on_progress: OnProgress | None = None,
    wrap: Callable[[nn.Module], Forward] | None = None,
    graph: bool = False,
    peer: Callable[[nn.Module], AbstractContextManager[None]] | None = None,
) -> Trained:
    """Train model, on config.device, as row.recipe says, and make it plain nn.Linear again.

    All rows take this path. In the dense one the swapped layers compute exactly what nn.Linear does.

    Args:
        row: Its recipe says which steps are sparse, and how.
        model: Of plain nn.Linear layers.
        task: What is learned.
        config: Settings of the training.
        on_progress: As in fit.
        wrap: As in fit.
        graph: As in fit.
        peer: Of the swapped model: the context in which another library computes its layers.

    Raises:
        NoLayerMatchedError: config.layers matches no layer of model.
        ConfigError: As RecipeSchedule and fit.
    """
    sparsify_model(model, config.layers, row.recipe.config)
    steps = config.epochs * task.steps_per_epoch(config.batch_size)
    optimizer = adamw(model, config, torch.optim.AdamW if row.recipe.dense_range is None else StepAdamW)
    schedule = RecipeSchedule(row.recipe, model, optimizer, steps, seed=config.seed)
    with nullcontext() if peer is None else peer(model):
        result = fit(
            model, task, config, schedule,
            optimizer=optimizer, name=row.title, on_progress=on_progress, wrap=wrap, graph=graph,
        )  # fmt: skip
    weights: Literal["dense", "masked"] = "masked" if schedule.phase == "sparse" else "dense"
    densify(model, weights=weights)
    schedule.finish()
    return Trained(result, weights)


def train_settings(config: TrainConfig) -> dict[str, Any]:
    """What Experiment.settings keeps of config: all but what the seed decides, and no hold where there is none.

    A hold of 0 changes nothing, and results from before there was a choice do not name it.
    """
    left_out = {"seed"} | (set() if config.hold_fraction else {"hold_fraction"})
    return {name: value for name, value in asdict(config).items() if name not in left_out}


def check_products(row: Row, result: RunResult) -> None:
    """Check that a sparse row was sparse.

    Args:
        row: The row that was trained.
        result: Its run.

    Raises:
        EngineError: The run had no sparse step, or a sparse phase ran no sparse product although the row's backend is
            "cusparselt".
    """
    if (row.recipe.sparse_fraction or row.recipe.dense_range) and not any(p.kind == "sparse" for p in result.phases):
        raise EngineError(
            f"{row.title}: none of its {result.steps} steps was sparse; train longer. Nothing was written"
        )
    for phase in result.phases:
        if phase.kind == "sparse" and row.recipe.config.backend == "cusparselt" and not phase.sparse_products:
            raise EngineError(
                f"{row.title}: no sparse product ran in steps {phase.start} to {phase.end}, although "
                "backend='cusparselt' was asked for; nothing was written"
            )
