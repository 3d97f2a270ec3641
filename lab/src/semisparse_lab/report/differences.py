"""How far the rows of an experiment end from its first one: a picture for rows whose curves would overlap."""

import statistics
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from semisparse_lab.report import style
from semisparse_lab.report.curves import curves
from semisparse_lab.report.result_files import Result
from semisparse_lab.report.summaries import first_row, summaries

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CLOSE = 1.0
"""A point: percentage points of an accuracy, percent of a loss."""

_LABEL = 34  # characters of a row's name before it is broken
_UNDER = 56  # characters of a line below the left panel
_ROW = 0.42  # inches
_BELOW = 0.14  # how far a row's seeds lie below its middle, and their mean above, so that neither hides the other


def picture(results: Sequence[Result]) -> bytes:
    """A PNG of one experiment: dots if its curves could not be told apart, otherwise curves.

    They cannot where all rows end within a point of the first one, or where there are more rows than colours. Dots need
    a first row and at least one seed that another row shares with it.

    Args:
        results: The runs, as run_document makes them.
    """
    ends = _ends(results)
    means = [statistics.fmean(row) for row in ends.values() if row]
    close = bool(means) and max(map(abs, means)) <= CLOSE
    return dots(results) if means and (close or len(ends) >= len(style.COLOURS)) else curves(results)


def dots(results: Sequence[Result]) -> bytes:
    """A PNG: the difference of each row's metric to that of the first row, and its flip rate where that was measured.

    A dot per seed, their mean and standard deviation. The flip rate is the mean over the run.

    Args:
        results: The runs, as run_document makes them.
    """
    better = results[0]["higher_is_better"]
    ends, flips = _ends(results), flip_rates(results)
    baseline = next(result["row_title"] for result in results if result["order"] == 0)
    names = [baseline, *ends]
    panels = 2 if any(flips.values()) else 1
    with style.figure(_ROW * len(names) + 1.2) as figure:
        axes, *others = figure.subplots(1, panels, sharey=True, squeeze=False, width_ratios=(2, 1)[:panels])[0]
        for place, name in enumerate(names):
            _row(axes, place, ends.get(name, []))
            for other in others:
                _row(other, place, flips.get(name, []))
        axes.axvline(0, color=style.INK, linewidth=1)
        axes.set_yticks(range(len(names)), [textwrap.fill(name, _LABEL) for name in names])
        axes.set_ylim(len(names) - 0.5, -0.5)
        metric, side = results[0]["metric"].removesuffix(", percent"), "right" if better else "left"
        compared = textwrap.fill(f"{metric}, {'points' if better else 'percent'} above {baseline}", _UNDER)
        axes.set_xlabel(f"{compared}\n({side} is better; dots: seeds; diamonds: mean, standard deviation)")
        for other in others:
            other.set_xlabel("flip rate of one step,\nmean of the run")
            other.set_xlim(0, 1.1 * max(map(max, flips.values())))
            other.locator_params(axis="x", nbins=4)
        for each in (axes, *others):
            each.grid(axis="y", visible=False)
        style.title(figure, results[0]["title"])
        return style.png(figure)


def _row(axes: "Axes", place: int, values: Sequence[float]) -> None:
    """The seeds of one row, and their mean with its spread above them."""
    axes.plot(values, [place + _BELOW] * len(values), ".", markersize=7, color=style.COLOURS[0])
    if values:
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        axes.errorbar(statistics.fmean(values), place - _BELOW, xerr=spread, color=style.COLOURS[1],
                      marker="D", markersize=5, capsize=3)  # fmt: skip


def _ends(results: Sequence[Result]) -> dict[str, list[float]]:
    """Row's title -> its differences to the first row, one per seed: in points, or in percent of a loss."""
    first = first_row(results)
    rows = [row for row in summaries(results) if row.slug != first]
    if results[0]["higher_is_better"]:
        return {row.title: row.differences for row in rows}
    return {row.title: [100 * share for share in row.shares] for row in rows}


def flip_rates(results: Sequence[Result]) -> dict[str, list[float]]:
    """Row's title -> the mean flip rate of each run in which it was measured."""
    found: dict[str, list[float]] = {}
    for result in results:
        rates = [epoch["flip_rate"] for epoch in result["run"]["epochs"] if epoch["flip_rate"] is not None]
        if rates:
            found.setdefault(result["row_title"], []).append(statistics.fmean(rates))
    return found
