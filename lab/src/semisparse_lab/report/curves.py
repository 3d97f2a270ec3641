"""The curves of an experiment as a picture."""

import io
import statistics
from collections.abc import Sequence
from typing import Any

from semisparse_lab.report.run_report import COLOURS, LINES


def curves(results: Sequence[dict[str, Any]]) -> bytes:
    """A PNG of one experiment's results: training loss, flip rate and validation score over steps.

    Lines are means over seeds, bands their range. A step at which a run has no value is left out.
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
        runs = [result["run"]["epochs"] for result in results if result["row"] == row]
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
    for place, (title, _) in zip(axes, panels, strict=True):
        place.set(title=title, xlabel="optimizer steps")
        place.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small")
    figure.suptitle(results[0]["title"])
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=110)
    return image.getvalue()
