"""The picture of time to loss: runs of equal tokens against tokens, runs of equal seconds against seconds."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from semisparse_lab.report import style
from semisparse_lab.report.time_to_loss import BITS, SECONDS, STEP, ArmRuns, bits_at, by_budget
from semisparse_lab.report.timed_document import Document

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_HEIGHT = 6.6  # inches
_SKIPPED = 0.2
"""Share of a run whose scores the plots' scale does not have to hold."""
_POINTS = 60
"""At which runs are subtracted."""
_PLACES = (("tokens", STEP, "million tokens"), ("seconds", SECONDS, "seconds of training"))


def curves(results: Sequence[Document]) -> bytes:
    """A PNG: validation bits per byte, and below them the differences to the first arm at the same place.

    Lines are means over seeds, bands their range. Without runs of one budget those of the other one are shown.

    Args:
        results: The runs.
    """
    groups = by_budget(results)
    slugs = list(dict.fromkeys(run["arm"] for run in sorted(results, key=lambda run: run["order"])))
    with style.figure(_HEIGHT) as figure:
        columns = zip(*figure.subplots(2, 2, sharex="col"), strict=True)
        handles: dict[int, tuple[Any, str]] = {}
        for (above, below), (budget, across, label) in zip(columns, _PLACES, strict=True):
            shown = budget if budget in groups else next(iter(groups))
            arms = [arm for arm in groups[shown] if arm.runs]
            lines, apart = [_Line([], [])], [_Line([], [])]
            for arm in arms:
                look = style.line_style(slugs.index(arm.slug))
                lines.append(_curve(arm, across))
                handles[arm.order] = lines[-1].draw(above, look, marker=".", markersize=4), arm.name
                if arms[0].order == 0 and arm is not arms[0]:
                    apart.append(_difference(arm, arms[0], across))
                    apart[-1].draw(below, look)
            above.set(title=f"Runs of equal {shown}", ylabel="validation bits per byte")
            below.set(xlabel=label, ylabel="to dense bf16, percent")
            below.axhline(0, **style.line_style(0))
            _scale(above, lines)
            _scale(below, apart, 0.0)
        if handles:
            shown_lines, names = zip(*(handles[order] for order in sorted(handles)), strict=True)
            figure.legend(shown_lines, names, loc="outside lower center", ncols=5, fontsize="small")
        style.title(figure, results[0]["title"])
        return style.png(figure)


@dataclass(frozen=True, slots=True)
class _Line:
    """Places on the horizontal axis, and the values of all seeds at each."""

    where: list[float]
    values: list[list[float]]

    def draw(self, axes: "Axes", look: dict[str, Any], **how: Any) -> Any:
        """A line of means, and a band between the least and the largest value; returns what a legend shows."""
        (line,) = axes.plot(self.where, list(map(statistics.fmean, self.values)), **how, **look)
        if self.values and len(self.values[0]) > 1:
            low, high = list(map(min, self.values)), list(map(max, self.values))
            axes.fill_between(self.where, low, high, alpha=0.15, linewidth=0, color=look["color"])
        return line


def _curve(arm: ArmRuns, across: int) -> _Line:
    """Scores of one arm, where all of its runs have them."""
    points = list(zip(*(run["scores"] for run in arm.runs.values()), strict=False))  # some may have a score fewer
    where = [statistics.fmean(point[across] for point in each) * _unit(arm, across) for each in points]
    return _Line(where, [[point[BITS] for point in each] for each in points])


def _difference(arm: ArmRuns, dense: ArmRuns, across: int) -> _Line:
    """How far one arm is from dense at the same place, in percent, where all runs of both have been."""
    pairs = [(run, dense.runs[seed]) for seed, run in arm.runs.items() if seed in dense.runs]
    if not pairs:
        return _Line([], [])
    first, last = (
        choose(run["scores"][place][across] for pair in pairs for run in pair)
        for choose, place in ((max, 0), (min, -1))
    )
    where = [first + (last - first) * step / (_POINTS - 1) for step in range(_POINTS)] if first < last else []
    return _Line(
        [place * _unit(arm, across) for place in where],
        [[100 * bits_at(ours, x, across) / bits_at(theirs, x, across) - 100 for ours, theirs in pairs] for x in where],
    )


def _unit(arm: ArmRuns, across: int) -> float:
    """What a step or a second counts on the axis."""
    return float(next(iter(arm.runs.values()))["tokens_per_step"] / 1e6) if across == STEP else 1.0


def _scale(axes: "Axes", lines: Sequence[_Line], *always: float) -> None:
    """Leave out of the vertical scale what only the first _SKIPPED of the lines show; values in always stay."""
    begin = _SKIPPED * max((line.where[-1] for line in lines if line.where), default=0.0)
    shown = [*always]
    for line in lines:
        for where, values in zip(line.where, line.values, strict=True):
            shown += values if where >= begin else []
    if shown and (low := min(shown)) < (high := max(shown)):
        axes.set_ylim(low - 0.06 * (high - low), high + 0.06 * (high - low))
