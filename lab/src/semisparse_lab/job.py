"""The main job: the three runs, one after another, and everything that they leave in the output folder."""

import errno
import importlib.util
import os
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from semisparse import SwapReport
from semisparse.errors import ConfigError
from semisparse_lab.checkpoint import file as checkpoint
from semisparse_lab.checks import shown
from semisparse_lab.data.images import Dataset
from semisparse_lab.errors import OutputExistsError
from semisparse_lab.files import check_replaceable
from semisparse_lab.models.vit import VisionTransformer, ViTConfig
from semisparse_lab.presets import Preset
from semisparse_lab.report.run_report import results_document, write_plot, write_results
from semisparse_lab.runs import FinishedRun, check_phases, sparsify_model, three_runs, train_run
from semisparse_lab.tasks.classification import ImageClassification
from semisparse_lab.train.config import TrainConfig
from semisparse_lab.train.loop import Progress
from semisparse_lab.train.results import RunResult

RESULTS_FILE = "results.json"
PLOT_FILE = "curves.png"
FILES = (RESULTS_FILE, PLOT_FILE, *(f"{plan.slug}{checkpoint.SUFFIX}" for plan in three_runs(0.5)))
"""What the job leaves in its output folder."""
_PACKAGES = ("safetensors", "matplotlib")

ProgressFor = Callable[[str], AbstractContextManager[Callable[[Progress], None]]]


def prepare_output(folder: Path, *, force: bool) -> None:
    """Create folder, or check that it may be written to. Call it after all other checks and before training.

    Raises OutputExistsError when folder holds anything and force is not set, or is not a folder at all; ConfigError
    when it cannot be created or written, or holds something under the name of a result that no file can replace.
    Deletes nothing, with force neither: each old file is replaced when its new content is there, and others are left
    alone.
    """
    try:
        if folder.is_symlink() and not folder.exists():
            raise OutputExistsError(f"out={shown(str(folder))} is a link to nothing; choose another name")
        if folder.exists() and not folder.is_dir():
            raise OutputExistsError(f"out={shown(str(folder))} is a file, not a folder; choose another name")
        if folder.is_dir() and any(folder.iterdir()) and not force:
            raise OutputExistsError(
                f"out={shown(str(folder))} is not empty; choose another folder or overwrite it with --force"
            )
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, "no permission to write there")
        for name in FILES:
            check_replaceable(folder / name)
        tempfile.TemporaryFile(dir=folder).close()  # what access does not know of: quotas, disks that are full
    except OSError as error:
        raise ConfigError(f"out={shown(str(folder))} cannot be written: {error.strerror or error}") from error


def check_packages() -> None:
    """Raise ConfigError, before any training, when a package that writes the results is missing."""
    for name in _PACKAGES:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"writing the results needs {name}: pip install 'semisparse-lab'")


def swap_report(model: ViTConfig, layers: str) -> SwapReport:
    """Which layers of the model will be sparse, without building its weights. Raises NoLayerMatchedError."""
    with torch.device("meta"):
        return sparsify_model(VisionTransformer(model), layers)


def check_data(data: Dataset, settings: Preset) -> None:
    """Raise ConfigError, before any training, where the settings do not fit the data."""
    task = ImageClassification(data, settings.augmentation)
    steps = settings.train.epochs * task.steps_per_epoch(settings.train.batch_size)
    check_phases(settings.train.sparse_fraction, steps)


def run_job(
    data: Dataset,
    settings: Preset,
    out: Path,
    progress_for: ProgressFor,
    *,
    keep: Callable[[Path], object] = lambda path: None,
) -> tuple[RunResult, ...]:
    """Train the three runs one after another and fill the folder out, which prepare_output has made ready.

    progress_for: called with each run's name; its context gives that run's on_progress. After each run its checkpoint,
    RESULTS_FILE and PLOT_FILE are written, so that these two always describe the runs that are finished; keep is told
    of each file. A run that diverges is written as the others are, and its result says so. Raises as check_data and
    train_run, CheckpointError, ConfigError where a file cannot be written.
    """
    check_data(data, settings)
    task = ImageClassification(data, settings.augmentation)
    described: dict[str, Any] = {
        "data": data.name,
        "model": asdict(settings.model),
        "train": asdict(settings.train),
        "augmentation": asdict(settings.augmentation),
        "sparse_layers": list(swap_report(settings.model, settings.train.layers).swapped),
        "checkpoints": {},
    }
    results: list[RunResult] = []
    plans = three_runs(settings.train.sparse_fraction)
    for plan in plans:
        with progress_for(plan.name) as on_progress:
            finished = train_run(plan, settings.model, task, settings.train, on_progress=on_progress)
        path = out / f"{plan.slug}{checkpoint.SUFFIX}"
        described["checkpoints"][plan.name] = _save(path, finished, data.name, settings.train)
        keep(path)
        results.append(finished.result)
        try:
            write_results(out / RESULTS_FILE, results_document(results, described, finished=len(results) == len(plans)))
            keep(out / RESULTS_FILE)
            write_plot(out / PLOT_FILE, results, f"{data.name}, seed {settings.train.seed}")
            keep(out / PLOT_FILE)
        except OSError as error:
            if len(results) == len(plans):  # earlier the other runs still may find room for their checkpoints
                raise ConfigError(f"out={str(out)!r} cannot be written: {error.strerror or error}") from error
    return tuple(results)


def _save(path: Path, finished: FinishedRun, data: str, config: TrainConfig) -> dict[str, str]:
    info = {
        "run": finished.plan.name,
        "weights": finished.weights,
        "data": data,
        "precision": config.precision,
        "seed": config.seed,
        "test_accuracy": finished.result.test.accuracy,
        "diverged": finished.result.diverged,
    }
    checksum = checkpoint.save(path, finished.model, info)
    return {"file": path.name, "weights": finished.weights, "sha256": checksum}
