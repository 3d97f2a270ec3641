"""How far the rows of an experiment end from its first one: a picture for rows whose curves would overlap."""

import statistics
import textwrap
from collections.abc import Sequence

from semisparse_lab.report import style
from semisparse_lab.report.curves import curves
from semisparse_lab.report.result_files import Result
from semisparse_lab.report.summaries import RowSummary, first_row, summaries

CLOSE = 1.0
"""A point: percentage points of an accuracy, percent of a loss."""

_LABEL = 34  # characters of a row's name before it is broken
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
    """A PNG: the difference of each row's metric to that of the first row. A dot per seed, mean and standard deviation.

    Args:
        results: The runs, as run_document makes them.
    """
    better = results[0]["higher_is_better"]
    ends = _ends(results)
    baseline = next(result["row_title"] for result in results if result["order"] == 0)
    with style.figure(_ROW * len(ends) + 1.2) as figure:
        axes = figure.subplots()
        for place, differences in enumerate(ends.values()):
            axes.plot(differences, [place + _BELOW] * len(differences), ".", markersize=7, color=style.COLOURS[0])
            if differences:
                spread = statistics.stdev(differences) if len(differences) > 1 else 0.0
                axes.errorbar(statistics.fmean(differences), place - _BELOW, xerr=spread, color=style.COLOURS[1],
                              marker="D", markersize=5, capsize=3)  # fmt: skip
        axes.axvline(0, color=style.INK, linewidth=1)
        axes.set_yticks(range(len(ends)), [textwrap.fill(row, _LABEL) for row in ends])
        axes.set_ylim(len(ends) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
        unit = "percentage points" if better else "percent"
        side = "right" if better else "left"
        axes.set_xlabel(
            f"{results[0]['metric'].removesuffix(', percent')}: difference to {baseline}, {unit}; {side} is better\n"
            "dots: seeds; diamonds: their mean, with the standard deviation"
        )
        style.title(figure, results[0]["title"])
        return style.png(figure)


def _ends(results: Sequence[Result]) -> dict[str, list[float]]:
    """Row's title -> its differences to the first row, one per seed: in points, or in percent of a loss."""
    first = first_row(results)
    rows: list[RowSummary] = [row for row in summaries(results) if row.slug != first]
    if results[0]["higher_is_better"]:
        return {row.title: row.differences for row in rows}
    return {row.title: [100 * share for share in row.shares] for row in rows}
