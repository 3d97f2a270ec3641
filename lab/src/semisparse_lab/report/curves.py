"""The curves of an experiment as a picture."""

import io
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's, told apart by people with any common colour vision."""
LINES = ("-", "--", "-.", ":")
"""Line styles, which tell runs apart in grey."""


def curves(results: Sequence[dict[str, Any]], *, log_loss: bool = False) -> bytes:
    """A PNG of one experiment's results: training loss, flip rate and validation score over steps.

    Lines are means over seeds, bands their range. A step at which a run has no value is left out. Where every row has
    one run, the sparse phase of each run that has dense phases too is shaded in its colour.

    Args:
        results: The runs, as run_document makes them.
        log_loss: Draw the training loss on a logarithmic scale.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 3)
    better = results[0]["higher_is_better"]
    panels = (
        ("training loss", lambda record: record["train_loss"]),
        ("flip rate of one step", lambda record: record["flip_rate"]),
        ("validation accuracy" if better else "validation loss",
         lambda record: record["validation"]["accuracy" if better else "loss"]),
    )  # fmt: skip
    titles = {result["row"]: result["row_title"] for result in sorted(results, key=lambda result: result["order"])}
    for number, (row, label) in enumerate(titles.items()):
        mine = [result["run"] for result in results if result["row"] == row]
        runs = [run["epochs"] for run in mine]
        style = {"color": COLOURS[number % len(COLOURS)], "linestyle": LINES[number % len(LINES)]}
        for place, (_, read) in zip(axes, panels, strict=True):
            points = [[read(record) for record in run] for run in runs]
            complete = list(zip(*points, strict=True))
            steps = [record["step"] for record, values in zip(runs[0], complete, strict=True) if None not in values]
            shown = [values for values in complete if None not in values]
            place.plot(steps, [statistics.fmean(values) for values in shown], marker=".", label=label, **style)
            if len(runs) > 1:
                place.fill_between(steps, [min(v) for v in shown], [max(v) for v in shown], alpha=0.15, linewidth=0,
                                   color=style["color"])  # fmt: skip
            if len(titles) == len(results):
                _shade(place, mine[0]["phases"], style["color"], f"sparse phase of {label}")
    for place, (title, _) in zip(axes, panels, strict=True):
        place.set(title=title, xlabel="optimizer steps")
        place.grid(alpha=0.3)
    if log_loss and any(line.get_ydata().size and line.get_ydata().max() > 0 for line in axes[0].get_lines()):
        axes[0].set_yscale("log")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small")
    figure.suptitle(results[0]["title"])
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=110)
    return image.getvalue()


def _shade(axes: "Axes", phases: Sequence[dict[str, Any]], color: str, label: str) -> None:
    if len({phase["kind"] for phase in phases}) > 1:
        for phase in phases:
            if phase["kind"] == "sparse":
                axes.axvspan(phase["start"], phase["end"], color=color, alpha=0.12, linewidth=0, label=label)
