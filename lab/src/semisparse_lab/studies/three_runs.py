"""What `semisparse-lab train` compares: a small ViT trained dense, sparse then dense, and fully sparse."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from semisparse import SwapReport, recipes
from semisparse.errors import ConfigError
from semisparse_lab.checkpoint import file as checkpoint
from semisparse_lab.data.images import Dataset
from semisparse_lab.experiment import (
    Experiment,
    OnProgress,
    Outcome,
    Row,
    Trained,
    sparsify_model,
    train_row,
    train_settings,
)
from semisparse_lab.interrupts import interrupted_later
from semisparse_lab.models.vit import VisionTransformer, ViTConfig, build_model
from semisparse_lab.pipeline import PLOT_FILE, RESULTS_FILE
from semisparse_lab.tasks.classification import Augmentation, ImageClassification
from semisparse_lab.train.config import TrainConfig


@dataclass(frozen=True, slots=True)
class Preset:
    """Everything a run needs besides the data. Sizes are multiples of 16, as the sparse GEMM of every block needs."""

    model: ViTConfig
    train: TrainConfig
    augmentation: Augmentation


# Chosen on the validation split of the dense run; the sparse runs get the same settings.
_PRESETS = {
    "digits": Preset(
        ViTConfig(image_size=8, patch_size=2, width=64, depth=2, heads=4),
        TrainConfig(epochs=40, batch_size=64, lr=6e-3),
        Augmentation(),
    ),
    "fashion-mnist": Preset(
        ViTConfig(image_size=28, patch_size=4, width=64, depth=4, heads=4),
        TrainConfig(epochs=20, batch_size=256, lr=2e-3),
        Augmentation(),
    ),
}


def preset(data: str) -> Preset:
    """Model, augmentation and training settings for a data set.

    Args:
        data: "digits" or "fashion-mnist".

    Raises:
        ConfigError: data is not "digits" or "fashion-mnist".
    """
    if data not in _PRESETS:
        raise ConfigError(f"data={data!r} is not one of {', '.join(map(repr, _PRESETS))}")
    return _PRESETS[data]


def rows(sparse_fraction: float) -> tuple[Row, ...]:
    """Dense, sparse then dense, fully sparse.

    Args:
        sparse_fraction: Share of the steps of the middle one that are sparse.

    Raises:
        ConfigError: Unless 0 < sparse_fraction < 1.
    """
    if not 0 < sparse_fraction < 1:
        raise ConfigError(
            f"sparse_fraction={sparse_fraction!r} must lie between 0 and 1, both excluded: "
            "the dense and the fully sparse run are trained in any case"
        )
    middle = recipes.dinov2(sparse_fraction=sparse_fraction)
    return (
        Row("dense", "dense", recipes.dinov2(sparse_fraction=0.0)),
        Row("sparse-then-dense", f"sparse then dense ({100 * sparse_fraction:g} %)", middle),
        Row("fully-sparse", "fully sparse", recipes.dinov2(sparse_fraction=1.0)),
    )


FILES = (RESULTS_FILE, PLOT_FILE, *(f"{row.slug}{checkpoint.SUFFIX}" for row in rows(0.5)))
"""What the three runs leave in their output folder."""


def swap_report(model: ViTConfig, layers: str) -> SwapReport:
    """Which layers of the model will be sparse, without building its weights.

    Args:
        model: Sizes of the model.
        layers: As the option of the command.

    Raises:
        NoLayerMatchedError: No layer would be sparse.
    """
    with torch.device("meta"):
        return sparsify_model(VisionTransformer(model), layers)


def experiment(
    data: Dataset,
    settings: Preset,
    sparse_fraction: float = 0.7,
    *,
    out: Path,
    keep: Callable[[Path], object] = lambda path: None,
) -> Experiment:
    """The three runs on data.

    Args:
        data: The images, on settings.train.device.
        settings: Model, training and augmentation. The seed is the one that a run is asked for.
        sparse_fraction: Sparse share of the steps of the sparse-then-dense run.
        out: Folder for the checkpoint that each run writes when it ends.
        keep: Told of each checkpoint that was written.

    Raises:
        ConfigError: The settings do not fit the data, or one of the middle run's phases would have no step.
        NoLayerMatchedError: settings.train.layers matches no layer.
    """
    task = ImageClassification(data, settings.augmentation)
    compared = rows(sparse_fraction)
    _check_phases(sparse_fraction, settings.train.epochs * task.steps_per_epoch(settings.train.batch_size))

    def train(row: Row, seed: int, on_progress: OnProgress) -> Outcome:
        config = replace(settings.train, seed=seed)
        model = build_model(settings.model, seed, config.device)
        trained = train_row(row, model, task, config, on_progress=on_progress)
        path = out / f"{row.slug}{checkpoint.SUFFIX}"
        with interrupted_later():
            checksum = checkpoint.save(path, model, _description(row, trained, data.name, config))
            keep(path)
        more = {"checkpoint": path.name, "weights": trained.weights, "sha256": checksum}
        return Outcome(100 * trained.result.test.accuracy, trained.result, more)

    return Experiment(
        name=data.name,
        title=f"ViT of width {settings.model.width} on {data.name}: dense, sparse then dense, fully sparse",
        metric="test accuracy, percent",
        higher_is_better=True,
        rows=compared,
        settings={
            "data": data.name,
            "model": asdict(settings.model),
            "train": train_settings(settings.train),
            "augmentation": asdict(settings.augmentation),
            "sparse_layers": list(swap_report(settings.model, settings.train.layers).swapped),
        },
        command="semisparse-lab train",
        train=train,
    )


def _check_phases(sparse_fraction: float, steps: int) -> None:
    """Raise ConfigError where the middle one of the three runs would, in whole steps, be one of the other two."""
    sparse = round(sparse_fraction * steps)
    if not 0 < sparse < steps:
        raise ConfigError(
            f"sparse_fraction={sparse_fraction!r} of {steps} steps is {sparse} steps, so that one of both phases would "
            "have none; train longer or choose another fraction"
        )


def _description(row: Row, trained: Trained, data: str, config: TrainConfig) -> dict[str, object]:
    return {
        "run": row.title,
        "weights": trained.weights,
        "data": data,
        "precision": config.precision,
        "seed": config.seed,
        "test_accuracy": trained.result.test.accuracy,
        "diverged": trained.result.diverged,
    }
