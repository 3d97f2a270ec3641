"""The main job: the three runs, one after another, and everything that they leave in the output folder."""

import errno
import importlib.util
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from semisparse.demo import checkpoint
from semisparse.demo.data import Dataset
from semisparse.demo.model import VisionTransformer, ViTConfig
from semisparse.demo.presets import Preset
from semisparse.demo.report import results_document, write_plot, write_results
from semisparse.demo.results import RunResult
from semisparse.demo.runs import FinishedRun, sparsify_model, three_runs, train_run
from semisparse.demo.task import ImageClassification
from semisparse.demo.train_config import TrainConfig
from semisparse.demo.training import Progress
from semisparse.errors import ConfigError, OutputExists
from semisparse.report import SwapReport

RESULTS_FILE = "results.json"
PLOT_FILE = "curves.png"
_PACKAGES = ("safetensors", "matplotlib")

ProgressFor = Callable[[str], AbstractContextManager[Callable[[Progress], None]]]


def prepare_output(folder: Path, *, force: bool) -> None:
    """Create folder, or check that it may be written to. Call it before training.

    Raises OutputExists when folder holds anything and force is not set, or is no folder at all; ConfigError when it
    cannot be created. force overwrites files of the same names and leaves all others alone.
    """
    try:
        if folder.exists() and not folder.is_dir():
            raise OutputExists(f"out={str(folder)!r} is a file, not a folder; choose another name")
        if folder.is_dir() and any(folder.iterdir()) and not force:
            raise OutputExists(f"out={str(folder)!r} is not empty; choose another folder or overwrite it with --force")
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, "no permission to write there")
        (folder / RESULTS_FILE).unlink(missing_ok=True)  # it describes runs that are about to be replaced
    except OSError as error:
        raise ConfigError(f"out={str(folder)!r} cannot be written: {error.strerror or error}") from error


def check_packages() -> None:
    """Raise ConfigError, before any training, when a package that writes the results is missing."""
    for name in _PACKAGES:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"writing the results needs {name}: pip install 'semisparse[demo]'")


def swap_report(model: ViTConfig, layers: str) -> SwapReport:
    """Which layers of the model will be sparse, without building its weights. Raises NoLayerMatched."""
    with torch.device("meta"):
        return sparsify_model(VisionTransformer(model), layers)


def run_job(data: Dataset, settings: Preset, out: Path, progress_for: ProgressFor) -> tuple[RunResult, ...]:
    """Train the three runs one after another and fill the folder out, which prepare_output has made ready.

    progress_for: called with each run's name; its context gives that run's on_progress. Writes one checkpoint a run as
    soon as it is there, then RESULTS_FILE and PLOT_FILE. Raises as train_run, CheckpointError, ConfigError where a file
    cannot be written.
    """
    task = ImageClassification(data, settings.augmentation)
    report = swap_report(settings.model, settings.train.layers)
    results: list[RunResult] = []
    checkpoints: dict[str, Any] = {}
    for plan in three_runs(settings.train.sparse_fraction):
        with progress_for(plan.name) as on_progress:
            finished = train_run(plan, settings.model, task, settings.train, on_progress=on_progress)
        checkpoints[plan.name] = _save(out, finished, data.name, settings.train)
        results.append(finished.result)
    document = results_document(
        results,
        {
            "data": data.name,
            "model": asdict(settings.model),
            "train": asdict(settings.train),
            "augmentation": asdict(settings.augmentation),
            "sparse_layers": list(report.swapped),
            "checkpoints": checkpoints,
        },
    )
    try:
        write_results(out / RESULTS_FILE, document)
        write_plot(out / PLOT_FILE, results, f"{data.name}, seed {settings.train.seed}")
    except OSError as error:
        raise ConfigError(f"out={str(out)!r} cannot be written: {error.strerror or error}") from error
    return tuple(results)


def _save(out: Path, finished: FinishedRun, data: str, config: TrainConfig) -> dict[str, str]:
    path = out / f"{finished.plan.slug}{checkpoint.SUFFIX}"
    info = {
        "run": finished.plan.name,
        "weights": finished.weights,
        "data": data,
        "precision": config.precision,
        "seed": config.seed,
        "test_accuracy": finished.result.test.accuracy,
    }
    checkpoint.save(path, finished.model, info)
    return {"file": path.name, "weights": finished.weights}
