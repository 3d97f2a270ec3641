"""The curves of an experiment as a picture."""

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from semisparse_lab.report import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HEIGHT = 6.0


def curves(results: Sequence[dict[str, Any]], *, log_loss: bool = False) -> bytes:
    """A PNG of one experiment's results: training loss, flip rate and validation score over steps.

    Lines are means over seeds, bands their range. A step at which a run has no value is left out. Where every row has
    one run, the sparse phase of each run that has dense phases too is shaded in its colour.

    Args:
        results: The runs, as run_document makes them.
        log_loss: Draw the training loss on a logarithmic scale.
    """
    better = results[0]["higher_is_better"]
    panels = (
        ("training loss", lambda record: record["train_loss"]),
        ("flip rate of one step", lambda record: record["flip_rate"]),
        ("validation accuracy" if better else "validation loss",
         lambda record: record["validation"]["accuracy" if better else "loss"]),
    )  # fmt: skip
    titles = {result["row"]: result["row_title"] for result in sorted(results, key=lambda result: result["order"])}
    with style.figure(HEIGHT) as figure:
        *axes, place_of_legend = figure.subplots(2, 2).flat
        for number, (row, label) in enumerate(titles.items()):
            mine = [result["run"] for result in results if result["row"] == row]
            runs = [run["epochs"] for run in mine]
            look = style.line_style(number)
            for place, (_, read) in zip(axes, panels, strict=True):
                points = [[read(record) for record in run] for run in runs]
                complete = list(zip(*points, strict=True))
                steps = [record["step"] for record, values in zip(runs[0], complete, strict=True) if None not in values]
                shown = [values for values in complete if None not in values]
                place.plot(steps, [statistics.fmean(values) for values in shown], marker=".", label=label, **look)
                if len(runs) > 1:
                    place.fill_between(steps, [min(v) for v in shown], [max(v) for v in shown], alpha=0.15, linewidth=0,
                                       color=look["color"])  # fmt: skip
                if len(titles) == len(results):
                    _shade(place, mine[0]["phases"], look["color"], f"sparse phase of {label}")
        for place, (title, _) in zip(axes, panels, strict=True):
            place.set(title=title, xlabel="optimizer steps")
        if log_loss and any(line.get_ydata().size and line.get_ydata().max() > 0 for line in axes[0].get_lines()):
            axes[0].set_yscale("log")
        style.legend_in(place_of_legend, axes[0])
        style.title(figure, results[0]["title"])
        return style.png(figure)


def _shade(axes: "Axes", phases: Sequence[dict[str, Any]], color: str, label: str) -> None:
    if len({phase["kind"] for phase in phases}) > 1:
        for phase in phases:
            if phase["kind"] == "sparse":
                axes.axvspan(phase["start"], phase["end"], color=color, alpha=0.12, linewidth=0, label=label)
