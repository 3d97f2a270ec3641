"""Experiments: the same training with several recipes and seeds, one result file a run, finished runs skipped."""

import json
import tempfile
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from semisparse import densify
from semisparse.environment import environment
from semisparse.errors import ConfigError, EngineError
from semisparse.recipes import Recipe, RecipeSchedule, StepAdamW
from semisparse_lab.checks import shown
from semisparse_lab.errors import OutputExistsError
from semisparse_lab.provenance import commit
from semisparse_lab.report.run_report import finite, write_results
from semisparse_lab.runs import sparsify_model
from semisparse_lab.strict_json import read
from semisparse_lab.tasks.task import Forward, Task
from semisparse_lab.train.config import TrainConfig, adamw
from semisparse_lab.train.loop import Progress, fit
from semisparse_lab.train.results import RunResult

KIND = "accuracy"

OnProgress = Callable[[Progress], None]
ProgressFor = Callable[[str], AbstractContextManager[OnProgress]]


@dataclass(frozen=True, slots=True)
class Row:
    """One configuration. slug: for file names; title: for tables; recipe: how it trains."""

    slug: str
    title: str
    recipe: Recipe


@dataclass(frozen=True, kw_only=True, slots=True)
class Experiment:
    """What is compared. name: for file names; metric: what Outcome.value is; settings: all that decides a result.

    rows: the first one is what the others are compared with. command: how a reader remakes the results. train: trains
    one row with one seed.
    """

    name: str
    title: str
    metric: str
    higher_is_better: bool
    rows: tuple[Row, ...]
    settings: dict[str, Any]
    command: str
    train: Callable[[Row, int, OnProgress], "Outcome"]

    def chosen(self, slugs: Iterable[str]) -> tuple[Row, ...]:
        """The rows with these slugs, all for none. Raises ConfigError for a slug that no row has."""
        wanted = list(slugs)
        known = [row.slug for row in self.rows]
        for slug in wanted:
            if slug not in known:
                raise ConfigError(f"row={slug!r} is not one of {', '.join(map(repr, known))}")
        return tuple(row for row in self.rows if not wanted or row.slug in wanted)


@dataclass(frozen=True, slots=True)
class Outcome:
    """value: the metric, of the test split; result: the run; more: further figures of the run, plain JSON values."""

    value: float
    result: RunResult
    more: dict[str, Any]


def run_experiment(
    experiment: Experiment,
    rows: Iterable[Row],
    seeds: Iterable[int],
    folder: Path,
    progress_for: ProgressFor,
    *,
    say: Callable[[str], None] = print,
    keep: Callable[[Path], object] = lambda path: None,
) -> list[Path]:
    """Train every row with every seed, seed by seed, and write folder/NAME.ROW.seedN.json for each; returns the paths.

    A run whose file is there is skipped. A run that diverged is written without a value (see diverged_runs).

    Args:
        experiment: What is compared.
        rows: Those of its rows that are trained.
        seeds: The seeds of each row.
        folder: For the result files; made where it is missing.
        progress_for: Called with each run's name; its context gives that run's on_progress.
        say: Told of each run that ended or was skipped, in a line.
        keep: Told of each run's file.

    Raises:
        OutputExistsError: Before any training, a result of this experiment in folder was made with other settings, or a
            file of its name is not a result.
        EngineError: A sparse phase was to run on the engine and no product did, or a sparse row had no sparse step. The
            run is not written then.
        ConfigError: folder cannot be written, or rows, seeds or settings do not fit.
    """
    rows, seeds = tuple(rows), tuple(seeds)
    jobs = [(row, seed, folder / f"{experiment.name}.{row.slug}.seed{seed}.json") for seed in seeds for row in rows]
    _check_jobs(experiment, rows, jobs)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()  # before hours of training, rather than after
    except OSError as error:
        raise ConfigError(f"out={str(folder)!r} cannot be written: {error.strerror or error}") from error
    for path in sorted(folder.glob(f"{experiment.name}.*.seed*.json")):
        _check_file(path, {"settings": experiment.settings})
    done = {path for _, _, path in jobs if path.exists()}
    for row, seed, path in jobs:
        if path in done:
            _check_file(path, _identity(experiment, row, seed))
    for number, (row, seed, path) in enumerate(jobs, start=1):
        name = f"[{number}/{len(jobs)}] {row.title}, seed {seed}"
        if path in done:
            say(f"{name}: there already, skipped")
            keep(path)
            continue
        with progress_for(name) as on_progress:
            outcome = experiment.train(row, seed, on_progress)
        _check_products(row, outcome.result)
        try:
            write_results(path, _document(experiment, row, seed, outcome))
        except OSError as error:
            raise ConfigError(f"out={str(folder)!r} cannot be written: {error.strerror or error}") from error
        keep(path)
        say(f"{name}: " + ("diverged" if outcome.result.diverged else f"{experiment.metric} {outcome.value:.4f}"))
    return [path for _, _, path in jobs]


def diverged_runs(paths: Iterable[Path]) -> list[str]:
    """The names of the files at paths, which run_experiment wrote, whose run diverged."""
    return [path.name for path in paths if read(path)["value"] is None]


def train_row(
    row: Row,
    model: nn.Module,
    task: Task,
    config: TrainConfig,
    *,
    on_progress: OnProgress | None = None,
    wrap: Callable[[nn.Module], Forward] | None = None,
    graph: bool = False,
) -> RunResult:
    """Train model, on config.device, as row.recipe says, and make it plain nn.Linear again.

    The weights of a run that ends sparse are the pruned ones then. All rows take this path, the dense one too.
    on_progress, wrap, graph: as in fit. Raises as sparsify_model, RecipeSchedule and fit.
    """
    sparsify_model(model, config.layers, row.recipe.config)
    steps = config.epochs * task.steps_per_epoch(config.batch_size)
    optimizer = adamw(model, config, torch.optim.AdamW if row.recipe.dense_range is None else StepAdamW)
    schedule = RecipeSchedule(row.recipe, model, optimizer, steps)
    result = fit(
        model, task, config, schedule,
        optimizer=optimizer, name=row.title, on_progress=on_progress, wrap=wrap, graph=graph,
    )  # fmt: skip
    densify(model, weights="masked" if schedule.phase == "sparse" else "dense")
    schedule.finish()
    return result


def train_settings(config: TrainConfig) -> dict[str, Any]:
    """What Experiment.settings keeps of config: all but what row and seed decide, and no hold where there is none.

    A hold of 0 changes nothing, and results from before there was a choice do not name it.
    """
    left_out = {"seed", "sparse_fraction"} | (set() if config.hold_fraction else {"hold_fraction"})
    return {name: value for name, value in asdict(config).items() if name not in left_out}


def _document(experiment: Experiment, row: Row, seed: int, outcome: Outcome) -> dict[str, Any]:
    facts = environment().facts
    run = {**asdict(outcome.result), "seconds_per_step": outcome.result.seconds_per_step}
    content = {
        "kind": KIND,
        **_identity(experiment, row, seed),
        "title": experiment.title,
        "row_title": row.title,
        "order": [other.slug for other in experiment.rows].index(row.slug),
        "metric": experiment.metric,
        "higher_is_better": experiment.higher_is_better,
        "command": experiment.command,
        "value": None if outcome.result.diverged else outcome.value,
        "more": outcome.more,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "environment": facts,
        "run": run,
    }
    checked: dict[str, Any] = finite(content)
    return checked


def _identity(experiment: Experiment, row: Row, seed: int) -> dict[str, Any]:
    """What a run was asked to be."""
    return {
        "experiment": experiment.name,
        "row": row.slug,
        "seed": seed,
        "recipe": row.recipe.describe(),
        "settings": experiment.settings,
    }


def _check_jobs(experiment: Experiment, rows: tuple[Row, ...], jobs: list[tuple[Row, int, Path]]) -> None:
    """Raise ConfigError for what would show only when the first run is written."""
    if len({path for _, _, path in jobs}) < len(jobs):
        raise ConfigError("rows or seeds name a run twice; give each once")
    experiment.chosen(row.slug for row in rows)
    try:
        json.dumps(experiment.settings)
    except TypeError as error:
        raise ConfigError(f"settings={experiment.settings!r} cannot be written as JSON: {error}") from error


def _check_file(path: Path, wanted: dict[str, Any]) -> None:
    """Raise OutputExistsError unless the file at path is a result in which the values called as in wanted are those."""
    try:
        found = read(path)
    except (OSError, ValueError) as error:
        raise OutputExistsError(
            f"{path} is there but no result: {error}; move it away or choose another folder"
        ) from error
    for key, value in json.loads(json.dumps(wanted)).items():
        other = found.get(key) if isinstance(found, dict) else None
        if other != value:
            raise OutputExistsError(
                f"{path} was made with {key}={shown(other)}, this run has {value!r}; choose another folder or move it "
                "away"
            )


def _check_products(row: Row, result: RunResult) -> None:
    if (row.recipe.sparse_fraction or row.recipe.dense_range) and not any(p.kind == "sparse" for p in result.phases):
        raise EngineError(
            f"{row.title}: none of its {result.steps} steps was sparse; train longer. Nothing was written"
        )
    for phase in result.phases:
        if phase.kind == "sparse" and row.recipe.config.engine == "cusparselt" and not phase.sparse_products:
            raise EngineError(
                f"{row.title}: no sparse product ran in steps {phase.start} to {phase.end}, although "
                "engine='cusparselt' was asked for; nothing was written"
            )
