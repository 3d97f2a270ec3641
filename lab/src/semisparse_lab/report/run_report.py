"""The demo's results as table rows, as JSON and as a plot."""

import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from semisparse.environment import environment
from semisparse_lab.files import write_atomically
from semisparse_lab.provenance import commit
from semisparse_lab.train.results import RunResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMAT = "semisparse-demo-results"
VERSION = 5

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's, told apart by people with any common colour vision."""
LINES = ("-", "--", "-.", ":")
"""Line styles, which tell runs apart in grey."""


@dataclass(frozen=True, slots=True)
class TableRow:
    """One line of the table.

    accuracy: test, in percent, None for a run that diverged; difference: to the first row, in points, None for itself
    and where either run diverged.
    """

    name: str
    accuracy: float | None
    difference: float | None
    seconds_per_step: float | None
    peak_memory: int | None


def table_rows(results: Sequence[RunResult]) -> list[TableRow]:
    """One row a run; the first run is the one that the others are compared with."""
    accuracies = [None if result.diverged else 100 * result.test.accuracy for result in results]
    first = accuracies[0]
    return [
        TableRow(
            name=result.name,
            accuracy=accuracy,
            difference=None if index == 0 or accuracy is None or first is None else accuracy - first,
            seconds_per_step=result.seconds_per_step,
            peak_memory=result.peak_memory.bytes,
        )
        for index, (result, accuracy) in enumerate(zip(results, accuracies, strict=True))
    ]


def results_document(
    results: Sequence[RunResult], settings: dict[str, Any], *, finished: bool = True
) -> dict[str, Any]:
    """Everything about the runs as plain JSON values. settings: what the caller wants kept beside them.

    finished: whether these are all runs of the job. Each run says whether it diverged (see RunResult). Numbers that are
    not finite become null, which JSON has no other word for.
    """
    document = {
        "format": FORMAT,
        "version": VERSION,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "environment": environment().facts,
        "settings": settings,
        "finished": finished,
        "runs": [
            {**asdict(result), "seconds_per_step": result.seconds_per_step, "diverged": result.diverged}
            for result in results
        ],
    }
    return finite(document)


def write_results(path: Path, document: dict[str, Any]) -> None:
    """Write document as indented JSON, in one atomic move."""
    write_atomically(path, json.dumps(document, indent=2, allow_nan=False).encode() + b"\n")


def write_plot(path: Path, results: Sequence[RunResult], title: str) -> None:
    """Write a PNG with training loss, flip rate and validation accuracy over steps, in one atomic move.

    The sparse phase of every run that has dense phases too is shaded in that run's colour.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    loss_axes, flip_axes, accuracy_axes = figure.subplots(1, 3)
    for index, result in enumerate(results):
        style = {"color": COLOURS[index % len(COLOURS)], "linestyle": LINES[index % len(LINES)]}
        steps = [record.step for record in result.epochs]
        losses = [record.train_loss for record in result.epochs]
        accuracies = [100 * record.validation.accuracy for record in result.epochs]
        loss_axes.plot(steps, losses, label=result.name, **style)
        accuracy_axes.plot(steps, accuracies, label=result.name, **style)
        flips = [math.nan if record.flip_rate is None else record.flip_rate for record in result.epochs]
        flip_axes.plot(steps, flips, label=result.name, **style)
        for axes in (loss_axes, flip_axes, accuracy_axes):
            _shade(axes, result, style["color"])
    loss_axes.set(title="training loss", xlabel="optimizer steps", ylabel="mean over the epoch")
    if any(0 < record.train_loss < math.inf for result in results for record in result.epochs):
        loss_axes.set_yscale("log")
    flip_axes.set(title="flip rate of the masks", xlabel="optimizer steps", ylabel="share of entries, one step")
    accuracy_axes.set(title="validation accuracy", xlabel="optimizer steps", ylabel="percent")
    accuracy_axes.legend(loc="lower right")
    for axes in (loss_axes, flip_axes, accuracy_axes):
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=150)
    write_atomically(path, image.getvalue())


def _shade(axes: "Axes", result: RunResult, color: str) -> None:
    if len({phase.kind for phase in result.phases}) < 2:
        return
    for phase in result.phases:
        if phase.kind == "sparse":
            label = f"sparse phase of {result.name}"
            axes.axvspan(phase.start, phase.end, color=color, alpha=0.12, linewidth=0, label=label)


def finite(value: Any) -> Any:
    """value, nested lists and dictionaries included, with None for every number that is not finite."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
