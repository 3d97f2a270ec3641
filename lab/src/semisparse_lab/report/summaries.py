"""The runs of each row of an experiment taken together: values, differences seed by seed, times."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from semisparse_lab.report.result_files import Result


@dataclass(frozen=True, slots=True)
class RowSummary:
    """All runs of one row.

    Attributes:
        slug: The row's short name.
        title: The row's title.
        values: The metric by seed.
        diverged: Seeds whose metric is not a number.
        differences: Differences of the metric to the baseline's, one per seed that both have.
        shares: The same as shares of the baseline's metric.
        sparse_products: Products on sparse tensor cores, the mean over the runs.
        seconds: Median seconds per step by kind of phase; empty if results of several GPUs are mixed.
    """

    slug: str
    title: str
    values: dict[int, float]
    diverged: list[int]
    differences: list[float]
    shares: list[float]
    sparse_products: int
    seconds: dict[str, float]


def first_row(results: Iterable[Result]) -> str | None:
    """The slug of the experiment's first row; None if it has no result."""
    return next((result["row"] for result in results if result["order"] == 0), None)


def summaries(results: Sequence[Result], baseline: str | None = None) -> list[RowSummary]:
    """One summary per row, in the order of the experiment's rows; the baseline comes first if there is one.

    Args:
        results: Of one experiment.
        baseline: The slug of the row that the others are compared with; None for the experiment's first row.
    """
    baseline = baseline or first_row(results)
    rows: dict[str, dict[int, Result]] = {}
    for result in sorted(results, key=lambda result: (result["row"] != baseline, result["order"], result["seed"])):
        rows.setdefault(result["row"], {})[result["seed"]] = result
    first = rows.get(baseline, {}) if baseline else {}
    base = {seed: result["value"] for seed, result in first.items() if result["value"] is not None}
    one_machine = len({result["gpu"] for result in results}) == 1
    found = []
    for slug, runs in rows.items():
        values = {seed: result["value"] for seed, result in runs.items() if result["value"] is not None}
        shared = [(value - base[seed], base[seed]) for seed, value in values.items() if seed in base]
        shared = [] if slug == baseline else shared
        phases = [phase for result in runs.values() for phase in result["run"]["phases"]]
        seconds: dict[str, list[float]] = {}
        for phase in phases:
            if phase["seconds_per_step"] is not None and one_machine:
                seconds.setdefault(phase["kind"], []).append(phase["seconds_per_step"])
        found.append(
            RowSummary(
                slug=slug,
                title=next(iter(runs.values()))["row_title"],
                values=values,
                diverged=sorted(runs.keys() - values.keys()),
                differences=[difference for difference, _ in shared],
                shares=[difference / value for difference, value in shared if value],
                sparse_products=sum(phase["sparse_products"] for phase in phases) // len(runs),
                seconds={kind: statistics.median(times) for kind, times in seconds.items()},
            )
        )
    return found


def spread(values: Sequence[float], digits: int, sign: str = "") -> str:
    """Mean and sample standard deviation, as in '92.31 ± 0.12'; the mean alone for one value, nothing for none."""
    if not values:
        return ""
    mean = f"{statistics.fmean(values):{sign}.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"
