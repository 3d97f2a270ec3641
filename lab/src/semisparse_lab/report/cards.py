"""Cards: tables and plots made from any set of result files of experiments."""

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from semisparse.errors import ConfigError
from semisparse.files import write_atomically
from semisparse_lab.checks import is_number
from semisparse_lab.commands import command_of
from semisparse_lab.errors import DataError
from semisparse_lab.report.differences import picture
from semisparse_lab.report.markdown import markdown
from semisparse_lab.report.result_files import Result, load_results
from semisparse_lab.report.summaries import RowSummary, first_row, spread, summaries


def by_experiment(results: Iterable[Result]) -> dict[str, list[Result]]:
    """Results by the name of their experiment."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result["experiment"], []).append(result)
    return groups


def table(results: Sequence[Result], baseline: str | None = None) -> str:
    """The metric of each row of one experiment, and its difference to the baseline, as a Markdown table.

    Differences of losses are also given in percent of the baseline, the mean over the seeds.

    Args:
        results: Of one experiment.
        baseline: As in summaries.
    """
    digits = _digits(results)
    rows, baseline = summaries(results, baseline), baseline or first_row(results)
    base = next((row.title for row in rows if row.slug == baseline), "the first row")
    against = base if len(base) < 20 else "the first row"  # a whole title would make the heading too wide
    head = f"| configuration | seeds | {results[0]['metric']} | difference to {against} |", "|---|---|--:|--:|"
    made = []
    for row in rows:
        seeds = ", ".join([*map(str, row.values), *(f"{seed} diverged" for seed in row.diverged)])
        cells = [row.title, seeds, spread(list(row.values.values()), digits), spread(row.differences, digits, "+")]
        if row.shares and not results[0]["higher_is_better"]:
            cells[-1] += f" ({statistics.fmean(row.shares):+.2%})"
        made.append(cells)
    return markdown(head, made)


def _digits(results: Sequence[Result]) -> int:
    """Decimals of the metric: 2 of an accuracy in percent, 4 of a loss."""
    return 2 if results[0]["higher_is_better"] else 4


def _dense_seconds(results: Sequence[Result], rows: Sequence[RowSummary]) -> float | None:
    """Median seconds of a dense step of the experiment's first row; None if it was not timed."""
    return next((row.seconds.get("dense") for row in rows if row.slug == first_row(results)), None)


def step_times(results: Sequence[Result]) -> str:
    """What each row multiplied sparse and how long its steps took, as a Markdown table."""
    rows = summaries(results)
    dense = _dense_seconds(results, rows)
    head = (
        "| configuration | sparse products per run | ms per sparse step | / dense step | ms per step, dense phase |",
        "|---|--:|--:|--:|--:|",
    )
    made = []
    for row in rows:
        times = [f"{1000 * row.seconds[kind]:.2f}" if kind in row.seconds else "" for kind in ("sparse", "dense")]
        share = f"{row.seconds['sparse'] / dense:.2f}x" if dense and "sparse" in row.seconds else ""
        made.append([row.title, f"{row.sparse_products:,}", times[0], share, times[1]])
    return markdown(head, made)


def gain(results: Sequence[Result]) -> str:
    """Whether the model gains speed from 2:4, as a sentence; empty where the times of the rows cannot be compared."""
    rows = summaries(results)
    dense = _dense_seconds(results, rows)
    factors = [row.seconds["sparse"] / dense for row in rows if dense and "sparse" in row.seconds]
    if not factors:
        return ""
    if all(row.sparse_products == 0 for row in rows):
        return (
            "Speed: no sparse product ran here, all were masked dense, so the step times below say nothing about the "
            "speed of 2:4."
        )
    low, high = (f"{factor:.2f}x" for factor in (min(factors), max(factors)))
    took = f"a sparse step took {low if low == high else f'{low} to {high}'} the dense step on one {results[0]['gpu']}."
    return f"Speed: this model is too small to gain from 2:4: {took}" if min(factors) >= 1 else f"Speed: {took}"


def further_figures(results: Sequence[Result]) -> str:
    """What Outcome.more says of each row, as a Markdown table of means; empty where it says nothing."""
    results = [result for result in results if result["value"] is not None]  # a diverged run has no meaningful figures
    names = [name for name, value in results[0]["more"].items() if isinstance(value, (int, float))] if results else []
    if not names:
        return ""
    cells = [["configuration", *(name.replace("_", " ") for name in names)]]
    for row in summaries(results):
        runs = [result["more"] for result in results if result["row"] == row.slug]
        figures = [
            spread(
                [run[name] for run in runs if is_number(run.get(name))],
                0 if isinstance(runs[0].get(name), int) else _digits(results),
            )
            for name in names
        ]
        cells.append([row.title, *figures])
    if len(cells) < len(cells[0]):  # more figures than rows: the narrower table has a line per figure
        cells = [["figure", *cells[0][1:]], *cells[1:]]
        cells = [list(column) for column in zip(*cells, strict=True)]
    lines = [f"| {' | '.join(line)} |" for line in cells]
    lines.insert(1, "|---" * len(cells[0]) + "|")
    return "\n".join(lines)


def kept_magnitudes(results: Sequence[Result]) -> str:
    """What the masks keep of the weights' magnitude early and late, as a Markdown table; empty where not recorded."""
    head = "| configuration | magnitude that the masks keep after the first epoch | after the last |", "|---|---|---|"
    made = []
    for row in summaries(results):
        runs = [result["run"]["epochs"] for result in results if result["row"] == row.slug]
        kept = [[run[place].get("kept_magnitude") for run in runs] for place in (0, -1)]
        if None not in (*kept[0], *kept[1]):
            made.append([row.title, *(spread(values, 4) for values in kept)])
    return markdown(head, made) if made else ""


def origin(results: Sequence[Result]) -> str:
    """What the results were measured on, each machine once, with the commits."""
    machines: dict[str, set[str]] = {}
    for result in results:
        facts = result["environment"]
        where = machine(result["gpu"])
        named = ", ".join(f"{name} {facts[name]}" for name in ("torch", "triton", "cuSPARSELt"))
        machines.setdefault(f"{where}, {named}", set()).add(_short(result["commit"]))
    return "; ".join(f"{machine}, commit {', '.join(sorted(commits))}" for machine, commits in machines.items())


def machine(gpu: str) -> str:
    """What a result was measured on, from the name of its GPU."""
    return "no GPU" if gpu == "none" else f"one {gpu}"


def _short(commit: str | None) -> str:
    """The first ten digits, and the mark of a tree with changes."""
    name, mark, _ = (commit or "unknown").partition("+")
    return name[:10] + ("+changes" if mark else "")


def remake(results: Sequence[Result]) -> str:
    """The commands that train these rows and seeds: one for each number of seeds."""
    command = command_of(results[0]["experiment"]) or results[0]["command"]  # results keep the command of their time
    commands: dict[int, str] = {}
    for row in summaries(results):
        seeds = max([*row.values, *row.diverged]) + 1
        commands[seeds] = commands.get(seeds, f"{command} --seeds {seeds}") + f" --row {row.slug}"
    return ", ".join(f"`{command}`" for command in commands.values())


def card(results: Sequence[Result], plot: str, more: Sequence[str] = ()) -> str:
    """The card of one experiment: table, more paragraphs, plot, origin, settings and the command that remakes it."""
    first = results[0]
    return "\n".join(
        [
            f"# {first['title']}",
            "",
            *(line for paragraph in (table(results), gain(results)) if paragraph for line in (paragraph, "")),
            "Mean ± sample standard deviation over the seeds; differences are taken seed by seed. All rows train with "
            "the same settings, data and data order. Sparse products are counted where they are started: 0 means that "
            "all products were dense or masked dense. Flip rates are of the masks that the weights would choose, also "
            "where a recipe holds others.",
            "",
            *(
                line
                for paragraph in (*more, step_times(results), kept_magnitudes(results), further_figures(results))
                if paragraph
                for line in (paragraph, "")
            ),
            f"![How the rows compare]({plot})",
            "",
            f"Measured on {origin(results)}.",
            "",
            f"Settings: `{json.dumps(first['settings'])}`",
            "",
            f"Remake: {remake(results)}",
            "",
        ]
    )


def write_cards(results: Path, out: Path) -> list[Path]:
    """Write out/NAME.md and out/NAME.png for each experiment with results in a folder.

    Args:
        results: The folder with result files.
        out: The folder for the cards.

    Returns:
        The paths of the cards.

    Raises:
        DataError: The folder has no result, or a damaged one.
        ConfigError: The folder for the cards cannot be written.
    """
    groups = by_experiment(load_results(results))
    if not groups:
        raise DataError(f"results={str(results)!r} holds no result of an experiment")
    made = []
    for name, group in groups.items():
        try:
            write_atomically(out / f"{name}.png", picture(group))
            write_atomically(out / f"{name}.md", card(group, f"{name}.png").encode())
        except OSError as error:
            raise ConfigError(f"out={str(out)!r} cannot be written: {error.strerror or error}") from error
        made.append(out / f"{name}.md")
    return made
