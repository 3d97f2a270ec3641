"""Cards of the experiments, and their tables on pages, from benchmarks/results/accuracy."""

import statistics
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks import time_to_loss_cards
from benchmarks.store import CARDS, RESULTS
from semisparse_lab.commands import command_of
from semisparse_lab.report import cards as experiments
from semisparse_lab.report.summaries import RowSummary, spread, summaries

Result = dict[str, Any]

ACCURACY = RESULTS / "accuracy"
MASK_STUDY = ("signed-greedy", "greedy", "sparse-100")
ON_PAGE = ("vit-fashion-mnist", "vit-fashion-mnist-long", "dino-fashion-mnist", "gpt-stdlib")
TEXT_ONCE = ("gpt-mvue", "gpt-fp8")
SPARSE_THEN_DENSE = ("sparse-070", "dinov2-070")
INTRO = (
    "MLPs 2:4 sparse for 70 % of the steps, then dense; means over seeds, differences seed by seed with their standard "
    "deviation.\nThe models are small, so that they can be trained many times. All rows: [Accuracy](docs/accuracy.md)."
)


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
    return made | time_to_loss_cards.cards(time_to_loss_cards.results())


def compared() -> Iterator[tuple[str, RowSummary, RowSummary]]:
    """Each experiment on the page: name, dense, and sparse then dense."""
    for name in ON_PAGE:
        rows = {row.slug: row for row in summaries(accuracy()[name])}
        yield name, rows["dense"], next(rows[slug] for slug in SPARSE_THEN_DENSE if slug in rows)


def summary() -> str:
    """Sparse, then dense beside dense, one row per experiment, with what its sparse steps cost."""
    lines = [
        "| experiment | metric | dense | sparse, then dense | difference | sparse step / dense step |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for name, dense, sparse in compared():
        first = accuracy()[name][0]
        digits = 2 if first["higher_is_better"] else 4
        cells = [name, first["metric"]]
        cells += [f"{statistics.fmean(row.values.values()):.{digits}f}" for row in (dense, sparse)]
        cells += [spread(sparse.differences, digits, "+"), f"{_factor(dense, sparse):.2f}x"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", steps()])


def steps() -> str:
    """What a sparse step of these models takes, in a sentence."""
    factors = [_factor(dense, sparse) for _, dense, sparse in compared()]
    small = "These models are too small to gain speed from 2:4: " if min(factors) >= 1 else ""
    verdict = f"{small}a sparse step took {min(factors):.2f}x to {max(factors):.2f}x the dense step."
    return verdict[0].upper() + verdict[1:]


def _factor(dense: RowSummary, sparse: RowSummary) -> float:
    return sparse.seconds["sparse"] / dense.seconds["dense"]


def short() -> str:
    """The same in two sentences, for a page that shows a larger model."""
    told = []
    for name, _, sparse in compared():
        if accuracy()[name][0]["higher_is_better"]:
            told.append(f"{name} {spread(sparse.differences, 2, '+')} points")
        else:
            told.append(f"{name} {spread([100 * share for share in sparse.shares], 2, '+')} % bits per byte")
    return (
        f"Small models, sparse and then dense, differ from dense by: {', '.join(told)}. {steps()} All recipes: "
        "[Accuracy](docs/accuracy.md)."
    )


def section() -> str:
    """README's section while there is no larger model."""
    every = [result for results in accuracy().values() for result in results]
    return "\n\n".join(["## What it costs in accuracy", INTRO, f"{summary()} Measured on {gpus(every)}."])


def blocks() -> dict[str, str]:
    """Name -> text of each generated block of the pages."""
    timed = time_to_loss_cards.results()
    made = {"accuracy": time_to_loss_cards.front(timed, short(), section())}
    made |= time_to_loss_cards.blocks(timed, time_to_loss_cards.tried())
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
    return time_to_loss_cards.gpus([one for one in results if one["experiment"] in ON_PAGE])
