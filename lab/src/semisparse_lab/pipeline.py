"""Running experiments: one result file per run, finished runs skipped; or all rows once into one file, with curves."""

import json
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from semisparse.errors import ConfigError
from semisparse.files import write_atomically
from semisparse_lab.checks import shown
from semisparse_lab.errors import OutputExistsError
from semisparse_lab.experiment import Experiment, ProgressFor, Row, check_products
from semisparse_lab.interrupts import interrupted_later
from semisparse_lab.report.curves import curves
from semisparse_lab.report.run_document import Document, identity, run_document, write_document
from semisparse_lab.strict_json import read

RESULTS_FILE = "results.json"
PLOT_FILE = "curves.png"

Keep = Callable[[Path], object]


def run_experiment(
    experiment: Experiment,
    rows: Iterable[Row],
    seeds: Iterable[int],
    folder: Path,
    progress_for: ProgressFor,
    *,
    say: Callable[[str], None] = print,
    keep: Keep = lambda path: None,
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
        EngineError: As check_products; the run is not written then.
        ConfigError: folder cannot be written, or rows, seeds or settings do not fit.
    """
    jobs = _jobs(experiment, rows, seeds, folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()  # before hours of training, rather than after
    except OSError as error:
        raise _unwritable(folder, error) from error
    for path in sorted(folder.glob(f"{experiment.name}.*.seed*.json")):
        _check_file(path, {"settings": experiment.settings})
    done = {path for _, _, path in jobs if path.exists()}
    for row, seed, path in jobs:
        if path in done:
            _check_file(path, identity(experiment, row, seed))
    for number, (row, seed, path) in enumerate(jobs, start=1):
        name = f"[{number}/{len(jobs)}] {row.title}, seed {seed}"
        if path in done:
            say(f"{name}: there already, skipped")
            keep(path)
            continue
        document = _train(experiment, row, seed, name, progress_for)
        try:
            with interrupted_later():
                write_document(path, document)
                keep(path)
        except OSError as error:
            raise _unwritable(folder, error) from error
        value = document["value"]
        say(f"{name}: " + ("diverged" if value is None else f"{experiment.metric} {value:.4f}"))
    return [path for _, _, path in jobs]


def run_rows(
    experiment: Experiment, seed: int, folder: Path, progress_for: ProgressFor, *, keep: Keep = lambda path: None
) -> list[Document]:
    """Train every row once and write folder/results.json and folder/curves.png after each run; returns the documents.

    So these two always describe the runs that are finished. "finished" in results.json says whether these are all.

    Args:
        experiment: What is compared; its train may write more files.
        seed: Of every run.
        folder: As prepare_output leaves it. Files that are there are replaced.
        progress_for: Called with each row's title; its context gives that run's on_progress.
        keep: Told of each file that was written.

    Raises:
        EngineError: As check_products.
        ConfigError: A file cannot be written. The runs before the last one do not stop for that: the others may still
            find room for what they write themselves.
    """
    documents: list[Document] = []
    for row in experiment.rows:
        documents.append(_train(experiment, row, seed, row.title, progress_for))
        finished = len(documents) == len(experiment.rows)
        try:
            with interrupted_later():
                write_document(folder / RESULTS_FILE, {"finished": finished, "runs": documents})
                keep(folder / RESULTS_FILE)
            picture = curves(documents, log_loss=True)
            with interrupted_later():
                write_atomically(folder / PLOT_FILE, picture)
                keep(folder / PLOT_FILE)
        except OSError as error:
            if finished:
                raise _unwritable(folder, error) from error
    return documents


def diverged_runs(paths: Iterable[Path]) -> list[str]:
    """The names of the files at paths, which run_experiment wrote, whose run diverged."""
    return [path.name for path in paths if read(path)["value"] is None]


def _train(experiment: Experiment, row: Row, seed: int, name: str, progress_for: ProgressFor) -> Document:
    with progress_for(name) as on_progress:
        outcome = experiment.train(row, seed, on_progress)
    check_products(row, outcome.result)
    return run_document(experiment, row, seed, outcome)


def _jobs(
    experiment: Experiment, rows: Iterable[Row], seeds: Iterable[int], folder: Path
) -> list[tuple[Row, int, Path]]:
    """The runs and their files. Checks first what would otherwise fail when the first run is written."""
    rows = tuple(rows)
    jobs = [(row, seed, folder / f"{experiment.name}.{row.slug}.seed{seed}.json") for seed in seeds for row in rows]
    if len({path for _, _, path in jobs}) < len(jobs):
        raise ConfigError("rows or seeds name a run twice; give each once")
    experiment.chosen(row.slug for row in rows)
    try:
        json.dumps(experiment.settings)
    except TypeError as error:
        raise ConfigError(f"settings={experiment.settings!r} cannot be written as JSON: {error}") from error
    return jobs


def _check_file(path: Path, wanted: dict[str, Any]) -> None:
    """Raise OutputExistsError unless the file at path is a result with the values that wanted names."""
    try:
        found = read(path)
    except (OSError, ValueError) as error:
        raise OutputExistsError(
            f"{path} is there but not a result: {error}; move it away or choose another folder"
        ) from error
    for key, value in json.loads(json.dumps(wanted)).items():
        other = found.get(key) if isinstance(found, dict) else None
        if other != value:
            raise OutputExistsError(
                f"{path} was made with {key}={shown(other)}, this run has {value!r}; choose another folder or move it "
                "away"
            )


def _unwritable(folder: Path, error: OSError) -> ConfigError:
    return ConfigError(f"out={str(folder)!r} cannot be written: {error.strerror or error}")
