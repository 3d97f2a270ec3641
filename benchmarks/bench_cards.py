"""The tables of docs/cards.md: cards that were run, by self-checks (results/bench-*.json), and what others published.

`semisparse bench --save benchmarks/results/bench-h100.json` is a run of ours; files that users sent are named
bench-sent-*.json.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from benchmarks.store import RESULTS, load
from benchmarks.table import Table
from semisparse.planning.candidates import DENSE
from semisparse.planning.known import PUBLISHED, SOURCE
from semisparse.selfcheck import files
from semisparse.selfcheck.contents import Report

CARDS = {
    "sm80": "A100",
    "sm86": "RTX 3090, A6000",
    "sm89": "RTX 4090, L40S",
    "sm90": "H100, H200",
    "sm100": "B200",
    "sm120": "RTX 5080, RTX 5090",
}
"""Architecture -> cards that have it."""

SHOWN = ("2:4", "fp8 + 2:4")
SENT = "bench-sent-"
BENCHMARKED = ("end-to-end", "linear", "compare-model", "compare-linear")
NOTE = (
    "Ratios are dense time / this time, forward + backward in bf16 with packing: of the largest layer of the check, "
    "eager, and of its small model, compiled where that works; dense is timed beside 2:4, which slows it at the power "
    "limit. *numerics*: paths that are right, of those there are."
)
NOT_OURS = (
    "What others published for products alone, without pruning, packing and weight gradient, so that a layer gains "
    "less. Not run by us; how many times faster than dense, median (10th to 90th percentile)."
)


def reports(folder: Path = RESULTS) -> list[tuple[str, Report]]:
    """Name of the file and content of each stored self-check of a GPU.

    Raises:
        BenchError: A file is damaged.
        ValueError: A file is of no GPU.
    """
    found = [(path.name, files.read(path)) for path in sorted(folder.glob("bench-*.json"))]
    for name, report in found:
        if report.gpu is None:
            raise ValueError(f"{name} is a self-check without a GPU: it says nothing of a card")
    return found


def table(found: Sequence[tuple[str, Report]], benchmarked: Sequence[str] = ()) -> Table:
    """A line for each self-check, and for each architecture without one.

    Args:
        found: As reports() gives them.
        benchmarked: Architectures of which there are other benchmarks of ours.
    """
    rows = []
    known = {**CARDS, **{one.gpu.architecture: "" for _, one in found if one.gpu and one.gpu.architecture not in CARDS}}
    for architecture, cards in known.items():
        here = [(name, one) for name, one in found if one.gpu is not None and one.gpu.architecture == architecture]
        rows += [_row(architecture, name, report) for name, report in here]
        if not here:
            run = "benchmarks, no self-check" if architecture in benchmarked else "not run by us"
            rows.append((architecture, cards, run, *[""] * 5))
    heads = [f"{part}, {name}" for part in ("layer", "model") for name in SHOWN]
    return Table(("capability", "card", "run", "numerics", *heads), tuple(rows))


def published() -> Table:
    """Medians that others measured, of the cards of this page."""
    rows = [(one.gpu, *one.cells) for one in PUBLISHED]
    return Table(("GPU", "bf16, 2:4", "fp8, 2:4 / dense fp8", "fp8 + 2:4 / dense bf16"), tuple(rows))


def block(found: Sequence[tuple[str, Report]] | None = None) -> str:
    """The generated part of the page."""
    found = reports() if found is None else found
    versions = "; ".join(_origin(report) for _, report in found)
    first = "\n\n".join([table(found, benchmarked()).markdown(), NOTE, *([f"Run: {versions}."] if versions else [])])
    return "\n\n".join([first, NOT_OURS, published().markdown(), f"Source: {SOURCE}."])


def benchmarked() -> set[str]:
    """Architectures of the stored benchmark results."""
    said = {one["provenance"]["environment"]["facts"]["GPU"] for kind in BENCHMARKED for one in load(kind)}
    return {f"sm{major}{minor}" for gpus in said for major, minor in re.findall(r"capability (\d+)\.(\d)", gpus)}


def _row(architecture: str, name: str, report: Report) -> tuple[str, ...]:
    assert report.gpu is not None
    run = f"{'sent in' if name.startswith(SENT) else 'by us'}, {report.started[:10]}"
    right = sum(check.outcome == "pass" for check in report.checks)
    there = sum(check.outcome != "skipped" for check in report.checks)
    left_out = f", {len(report.checks) - there} skipped" if there < len(report.checks) else ""
    layers = report.layers[-1].measurement.times if report.layers else {}
    model = {} if report.model is None else report.model.ms
    cells = [f"**{layers[DENSE].ms / layers[one].ms:.2f}**" if one in layers else "" for one in SHOWN]
    cells += [f"**{model[DENSE] / model[one]:.2f}**" if one in model and DENSE in model else "" for one in SHOWN]
    return (architecture, _cell(report.gpu.name), run, f"{right} of {there}{left_out}", *cells)


def _origin(report: Report) -> str:
    assert report.gpu is not None
    named = (f"{name} {report.facts[name]}" for name in ("torch", "cuSPARSELt", "driver") if name in report.facts)
    return _cell(f"{report.gpu.name}, {', '.join(named)}")


def _cell(text: str) -> str:
    """Text of a file in Markdown: without what would end a cell or be read as markup."""
    return re.sub(r"[|`<>\[\]*_\\]", " ", text)
