"""The card of time to loss: tables at equal tokens and at equal seconds, and curves against both."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from semisparse.errors import ConfigError
from semisparse.files import write_atomically
from semisparse_lab.errors import DataError
from semisparse_lab.report import style
from semisparse_lab.report.cards import origin
from semisparse_lab.report.summaries import spread
from semisparse_lab.report.time_to_loss import (
    BITS,
    SECONDS,
    ArmRuns,
    Compared,
    at_end,
    at_equal_seconds,
    by_budget,
    times_faster,
)
from semisparse_lab.report.timed_document import Document, load_timed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

REFERENCES = 2
"""The first so many arms are those that others are compared with: dense bf16 and torchao float8."""
HEADINGS = {"tokens": "Runs of equal tokens", "seconds": "Runs of equal seconds"}
_ROW_HEIGHT = 3.6  # inches
_SKIPPED = 0.1
"""Share of a run whose scores the plots' scale does not have to hold."""


def write_card(results: Path, out: Path) -> Path:
    """Write out/NAME.md and out/NAME.png from the runs in a folder, and return the path of the card.

    Args:
        results: The folder with result files, any number of arms and seeds.
        out: The folder for the card.

    Raises:
        DataError: The folder has no run, or a damaged one.
        ConfigError: The card cannot be written.
    """
    found = load_timed(results)
    if not found:
        raise DataError(f"results={str(results)!r} holds no finished run")
    name = found[0]["experiment"]
    try:
        write_atomically(out / f"{name}.png", curves(found))
        write_atomically(out / f"{name}.md", card(found, f"{name}.png").encode())
    except OSError as error:
        raise ConfigError(f"out={str(out)!r} cannot be written: {error.strerror or error}") from error
    return out / f"{name}.md"


def card(results: Sequence[Document], plot: str) -> str:
    """The card of timed runs of one experiment.

    Args:
        results: The runs.
        plot: Name of the picture.
    """
    first = results[0]
    share = first["multiplications"]
    lines: list[str] = [f"# {first['title']}", ""]
    for budget, arms in by_budget(results).items():
        lines += [f"## {HEADINGS.get(budget, budget)}", "", ends(arms), "", pairs(arms, budget), ""]
    lines += [
        f"![Validation bits per byte against tokens and seconds]({plot})",
        "",
        "Mean ± sample standard deviation over the seeds; differences are taken seed by seed, negative is better, "
        "and p is of a one-sided paired t-test that the first arm is below the second. Seconds are of pure "
        "training: batch, forward, backward, clipping, optimizer and schedule; compiling and scoring are left out "
        "and stand in a column of their own. At equal seconds, both arms are read where the shorter of the two runs "
        "ends, on a straight line between the neighbouring scores on the way. Bits per byte are exact: the "
        "cross-entropies of the tokens over the bytes for which they stand.",
        "",
        f"{share['block_linears'] / sum(share.values()):.1%} of the model's multiplications are in the linear layers "
        "in which the arms differ.",
        "",
        f"Measured on {origin(results)}, torchao {first.get('torchao') or 'not installed'}.",
        "",
        f"Settings: `{json.dumps(first['settings'])}`",
        "",
        "Remake: `semisparse-lab data linux`, `semisparse-lab experiment llama-linux --time-only 60`, then without "
        "`--time-only` for each of `--budget tokens` and `--budget seconds`; `semisparse-lab card RESULTS`.",
        "",
    ]
    return "\n".join(lines)


def ends(arms: Sequence[ArmRuns]) -> str:
    """How the runs of each arm ended, as a Markdown table.

    Args:
        arms: Of one budget.
    """
    lines = [
        "| arm | seeds | steps | validation loss, nats per token | validation bits per byte | test bits per byte | "
        "training seconds | compiling, scoring | tokens per second | peak memory |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for arm in arms:
        seeds = ", ".join([*map(str, arm.runs), *(f"{seed} diverged" for seed in arm.diverged)])
        runs = list(arm.runs.values())
        if not runs:
            lines.append(f"| {arm.title} | {seeds} |" + " |" * 8)
            continue
        started = statistics.fmean(sum(run["start_seconds"]) for run in runs)
        scored = statistics.fmean(run["score_seconds"] + run["final_seconds"] for run in runs)
        memory = [run["peak_memory"]["bytes"] for run in runs if run["peak_memory"].get("bytes")]
        cells = [
            arm.title,
            seeds,
            ", ".join(sorted({f"{run['steps']:,}" for run in runs})),
            spread([run["validation"]["nats_per_token"] for run in runs], 4),
            spread([run["validation"]["bits_per_byte"] for run in runs], 4),
            spread([run["test"]["bits_per_byte"] for run in runs], 4),
            spread([run["seconds"] for run in runs], 1),
            f"{started:.0f} s, {scored:.0f} s",
            f"{statistics.fmean(run['tokens_per_second'] for run in runs):,.0f}",
            f"{max(memory) / 2**30:.1f} GiB" if memory else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def pairs(arms: Sequence[ArmRuns], budget: str) -> str:
    """Each arm beside the references, at the end of the runs and at equal seconds, as a Markdown table.

    Args:
        arms: Of one budget.
        budget: What their runs have in equal parts.
    """
    end = "at the end, equal tokens" if budget == "tokens" else "at the end"
    lines = [
        f"| validation bits per byte | {end} | p | at equal seconds | p | the other's last loss is reached |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for reference in [arm for arm in arms if arm.order < REFERENCES]:
        for arm in arms:
            if arm is not reference and arm.runs and reference.runs:
                sooner = times_faster(arm, reference)
                reached = f"{spread(sooner, 2)}x sooner" if sooner else "never"
                cells = [*_cells(at_end(arm, reference)), *_cells(at_equal_seconds(arm, reference)), reached]
                lines.append(f"| {arm.title} against {reference.title} | {' | '.join(cells)} |")
    said = (
        "Runs of equal tokens end at different seconds: the slower arm is then read before its learning rate has "
        "fallen, which favours the faster one. Runs of equal seconds do not have this fault."
    )
    return "\n".join([*lines, *(["", said] if budget == "tokens" else [])])


def _cells(compared: Compared) -> tuple[str, str]:
    """Mean difference in percent with its spread, and p."""
    if not compared.seeds:
        return "", ""
    p = "" if compared.p is None else f"{compared.p:.3f}"
    return f"{spread([100 * share for share in compared.shares], 2, '+')} %", p


def curves(results: Sequence[Document]) -> bytes:
    """A PNG: validation bits per byte against tokens and against seconds, a row of panels for each budget.

    Lines are means over seeds, bands their range.

    Args:
        results: The runs.
    """
    groups = by_budget(results)
    slugs = list(dict.fromkeys(run["arm"] for run in sorted(results, key=lambda run: run["order"])))
    with style.figure(_ROW_HEIGHT * len(groups) + 1.2) as figure:
        rows = figure.subplots(len(groups), 2, squeeze=False, sharey="row")
        handles: dict[str, Any] = {}
        for (budget, arms), axes in zip(groups.items(), rows, strict=True):
            for arm in arms:
                handles[arm.title] = _draw(axes, arm, style.line_style(slugs.index(arm.slug)))
            for place, what in zip(axes, ("million tokens", "seconds of training"), strict=True):
                place.set(title=HEADINGS.get(budget, budget), xlabel=what, ylabel="validation bits per byte")
            _scale(axes[0], arms)
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2, fontsize="small")
        style.title(figure, results[0]["title"])
        return style.png(figure)


def _draw(axes: Sequence["Axes"], arm: ArmRuns, look: dict[str, Any]) -> Any:
    """One arm's curves against tokens and seconds; returns what the legend shows."""
    runs = list(arm.runs.values())
    points = list(zip(*(run["scores"] for run in runs), strict=False))  # runs of other lengths end earlier
    bits = [[point[BITS] for point in each] for each in points]
    tokens = [each[0][0] * runs[0]["tokens_per_step"] / 1e6 for each in points]
    seconds = [statistics.fmean(point[SECONDS] for point in each) for each in points]
    line = None
    for place, across in zip(axes, (tokens, seconds), strict=True):
        (line,) = place.plot(across, list(map(statistics.fmean, bits)), marker=".", **look)
        if len(runs) > 1:
            place.fill_between(across, list(map(min, bits)), list(map(max, bits)), alpha=0.15, linewidth=0,
                               color=look["color"])  # fmt: skip
    return line


def _scale(axes: "Axes", arms: Sequence[ArmRuns]) -> None:
    """Leave out of the vertical scale what is above the scores after _SKIPPED of a run."""
    shown = [
        [point[BITS] for point in run["scores"][int(_SKIPPED * len(run["scores"])) :]]
        for arm in arms
        for run in arm.runs.values()
    ]
    if shown:
        low, high = min(map(min, shown)), max(map(max, shown))
        axes.set_ylim(low - 0.03 * (high - low), high + 0.03 * (high - low))
