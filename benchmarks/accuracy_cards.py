"""Cards of the experiments, and their tables on pages, from benchmarks/results/accuracy."""

import statistics
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.store import CARDS, RESULTS
from semisparse_lab.commands import command_of
from semisparse_lab.report import cards as experiments
from semisparse_lab.report.summaries import spread, summaries

Result = dict[str, Any]

ACCURACY = RESULTS / "accuracy"
MASK_STUDY = ("signed-greedy", "greedy", "sparse-100")
ON_PAGE = ("vit-fashion-mnist", "vit-fashion-mnist-long", "dino-fashion-mnist", "gpt-stdlib")
TEXT_ONCE = ("gpt-mvue", "gpt-fp8")
SPARSE_THEN_DENSE = ("sparse-070", "dinov2-070")


@cache
def accuracy() -> dict[str, list[Result]]:
    """Stored results of the experiments, by experiment; read once."""
    return experiments.by_experiment(experiments.load_results(ACCURACY))


def mask_study(results: list[Result]) -> str:
    """How masks are chosen: the fully sparse rows that differ in nothing else."""
    chosen = [result for result in results if result["row"] in MASK_STUDY]
    return experiments.table(chosen, baseline=MASK_STUDY[0])


def cards() -> dict[Path, str]:
    """A card for each experiment; its plot lies beside it."""
    made = {}
    for name, results in accuracy().items():
        studied = {result["row"] for result in results}.issuperset(MASK_STUDY)
        more = ["The three ways to choose masks, compared with each other:", mask_study(results)] if studied else []
        made[CARDS / f"{name}.md"] = experiments.card(results, f"{name}.png", more)
    return made


def summary() -> str:
    """Sparse, then dense beside dense, one row per experiment, with what its sparse steps cost."""
    lines = [
        "| experiment | metric | dense | sparse, then dense | difference | sparse step / dense step |",
        "|---|---|--:|--:|--:|--:|",
    ]
    factors = []
    for name in ON_PAGE:
        results = accuracy()[name]
        rows = {row.slug: row for row in summaries(results)}
        dense, sparse = rows["dense"], next(rows[slug] for slug in SPARSE_THEN_DENSE if slug in rows)
        digits = 2 if results[0]["higher_is_better"] else 4
        cells = [name, results[0]["metric"]]
        cells += [f"{statistics.fmean(row.values.values()):.{digits}f}" for row in (dense, sparse)]
        cells += [spread(sparse.differences, digits, "+")]
        factors.append(sparse.seconds["sparse"] / dense.seconds["dense"])
        lines.append(f"| {' | '.join([*cells, f'{factors[-1]:.2f}x'])} |")
    small = "These models are too small to gain speed from 2:4: " if min(factors) >= 1 else ""
    verdict = f"{small}a sparse step took {min(factors):.2f}x to {max(factors):.2f}x the dense step."
    return "\n".join([*lines, "", verdict[0].upper() + verdict[1:]])


def blocks() -> dict[str, str]:
    """Name -> text of each generated block of the pages."""
    every = [result for results in accuracy().values() for result in results]
    made = {"accuracy": f"{summary()} Measured on {gpus(every)}."}
    for name in (*ON_PAGE, *TEXT_ONCE):
        results = accuracy().get(name, [])
        if not results:
            made[name] = f"Not measured yet: `{command_of(name)}`."
            continue
        where, commands = experiments.origin(results), experiments.remake(results)
        paragraphs = (experiments.table(results), experiments.gain(results), experiments.step_times(results))
        made[name] = "\n\n".join([*filter(None, paragraphs), f"Measured on {where}. Remake: {commands}."])
    return made


def gpus(results: list[Result]) -> str:
    """The GPUs of experiments shown on the page."""
    return " and ".join(
        f"one {name}" for name in sorted({one["gpu"] for one in results if one["experiment"] in ON_PAGE})
    )
