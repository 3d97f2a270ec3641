"""Cards, and the figures of README and docs, generated from benchmarks/results. A test compares; run after each result.

python benchmarks/cards.py

A page holds marked places, <!-- generated: NAME --> ... <!-- end -->, which are filled with the block of that name.
"""

import statistics
import sys
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that the file runs as a script from anywhere

from benchmarks import picture, tables
from benchmarks.blocks import filled
from benchmarks.models import NO_GAIN
from benchmarks.origin import origin, short_origin
from benchmarks.store import ROOT, load
from semisparse_lab.report import cards as experiments
from semisparse_lab.report.curves import curves

RESULTS, CARDS = ROOT / "benchmarks" / "results", ROOT / "benchmarks" / "cards"
ACCURACY = RESULTS / "accuracy"
PAGES = tuple(ROOT / name for name in ("README.md", "docs/speed.md", "docs/accuracy.md"))
MASK_STUDY = ("signed-greedy", "greedy", "sparse-100")
ON_PAGE = ("vit-fashion-mnist", "vit-fashion-mnist-long", "dino-fashion-mnist", "gpt-stdlib")
SPARSE_THEN_DENSE = ("sparse-070", "dinov2-070")
COMMAND = "python benchmarks/benchmark_semi_structured_training.py"

Result = dict[str, Any]


def linear_card(result: Result) -> str:
    """Every variant and part of one linear benchmark."""
    shape = ",".join(map(str, result["mkn"]))
    return _page(
        f"One linear layer, M x K x N = {tables.size(result['mkn'])}",
        tables.linear_summary([result]).markdown(),
        "Forward + backward, bf16 parameters with bias, gradients set to None before each call, packing included. "
        f"Variants interleaved in one process, sustained. {tables.limit_note([result])}",
        tables.linear_variants(result).markdown(),
        tables.linear_parts(result).markdown(),
        origin([result]),
        f"Remake: `{COMMAND} --linear --mkn {shape} --save`",
    )


def end_to_end_card(result: Result) -> str:
    """One whole training step."""
    times = {kind: f"{time['p20_ms']:.1f} to {time['p80_ms']:.1f}" for kind, time in result["times_ms"].items()}
    saved = ", ".join(f"{shape}: {ms:.2f} ms" for shape, ms in result["saved_by_products_ms"].items())
    products = f" The products of these layers save, packing not counted ({saved} by N x K)." if saved else ""
    return _page(
        result["title"],
        tables.end_to_end([result]).markdown(),
        f"p20 to p80: dense {times['dense']} ms, 2:4 {times['sparse']} ms. "
        f"{result['swapped']} linears are 2:4.{products}",
        tables.limit_note(load("linear")),
        result["note"],
        origin([result]),
        f"Remake: `{COMMAND} --card {result['card']} --save`",
    )


def no_gain_card() -> str:
    """Where 2:4 does not help: whole steps, then single layers."""
    steps, small = no_gain_steps(), load("small-linear")
    return _page(
        "Where 2:4 does not help",
        "Dense and 2:4 interleaved in one process, sustained; a ratio below 1 means that 2:4 is slower. The spread is "
        "that of the ratio over the interleaved rounds.",
        tables.end_to_end(steps).markdown() if steps else "",
        "One linear layer, forward + backward with its packing, bf16:",
        tables.small_linear(small).markdown() if small else "",
        origin([*steps, *small]),
        f"Remake: `{COMMAND} --no-gain --save`",
    )


def pack_card() -> str:
    """The pack kernel at all its sizes."""
    results = packs()
    return _page(
        "Packing a weight in both directions, bf16",
        tables.pack(results).markdown(),
        "Cold L2 cache, calls replayed from a CUDA graph. The copy moves as many bytes as packing does; the tile op is "
        "`torch._sparse_semi_structured_tile`.",
        origin(results),
        f"Remake: `{COMMAND} --pack --save`",
    )


def metrics_card() -> str:
    """The cost of following the masks."""
    results = load("metrics")
    return _page(
        "Following the masks: MaskMetrics at its default interval",
        tables.metrics(results).markdown(),
        "The metrics of an interval are two mask computations and one set of statistics for all sparse layers, timed "
        "back to back on their own and compared with the steps of the interval.",
        origin(results),
        f"Remake: `{COMMAND} --metrics --save`",
    )


def packs() -> list[Result]:
    """Results of the pack kernel, smallest first."""
    return sorted(load("pack"), key=lambda result: result["nk"])


def gaining_steps() -> list[Result]:
    """Whole steps that are here to show a gain."""
    return [result for result in load("end-to-end") if result["card"] not in NO_GAIN]


def no_gain_steps() -> list[Result]:
    """Whole steps that are here to show where there is none."""
    return [result for result in load("end-to-end") if result["card"] in NO_GAIN]


@cache
def accuracy() -> dict[str, list[Result]]:
    """Stored results of the experiments, by experiment; read once."""
    return experiments.by_experiment(experiments.load_results(ACCURACY))


def mask_study(results: list[Result]) -> str:
    """How masks are chosen: the fully sparse rows that differ in nothing else."""
    chosen = [result for result in results if result["row"] in MASK_STUDY]
    return experiments.table(chosen, baseline=MASK_STUDY[0])


def accuracy_cards() -> dict[Path, str]:
    """A card for each experiment; its plot lies beside it."""
    made = {}
    for name, results in accuracy().items():
        studied = {result["row"] for result in results}.issuperset(MASK_STUDY)
        more = ["The three ways to choose masks, compared with each other:", mask_study(results)] if studied else []
        made[CARDS / f"{name}.md"] = experiments.card(results, f"{name}.png", more)
    return made


def accuracy_summary() -> str:
    """Sparse, then dense beside dense, one row per experiment, with what its sparse steps cost."""
    lines = [
        "| experiment | metric | dense | sparse, then dense | difference | sparse step / dense step |",
        "|---|---|--:|--:|--:|--:|",
    ]
    factors = []
    for name in ON_PAGE:
        results = accuracy()[name]
        rows = {row.slug: row for row in experiments.summaries(results)}
        dense, sparse = rows["dense"], next(rows[slug] for slug in SPARSE_THEN_DENSE if slug in rows)
        digits = 2 if results[0]["higher_is_better"] else 4
        cells = [name, results[0]["metric"]]
        cells += [f"{statistics.fmean(row.values.values()):.{digits}f}" for row in (dense, sparse)]
        cells += [experiments.spread(sparse.differences, digits, "+")]
        factors.append(sparse.seconds["sparse"] / dense.seconds["dense"])
        lines.append(f"| {' | '.join([*cells, f'{factors[-1]:.2f}x'])} |")
    small = "These models are too small to gain speed from 2:4: " if min(factors) >= 1 else ""
    verdict = f"{small}a sparse step took {min(factors):.2f}x to {max(factors):.2f}x the dense step."
    return "\n".join([*lines, "", verdict[0].upper() + verdict[1:]])


def blocks() -> dict[str, str]:
    """Name -> text of each generated block of the pages."""
    linear, small, steps, slow = load("linear"), load("small-linear"), gaining_steps(), no_gain_steps()
    losing = tables.losing([*slow, *small, *linear])
    every = [result for results in accuracy().values() for result in results]
    made = {
        "speed": f"{tables.end_to_end_short(steps).markdown()}\n\n{short_origin(steps)}",
        "no-gain": f"{losing.markdown()}\n\n{short_origin([*slow, *small, *linear])}",
        "accuracy": f"{accuracy_summary()} Measured on {gpus(every)}.",
        "end-to-end": _remade(tables.end_to_end(steps).markdown(), steps, ""),
        "limit": tables.limit_note(linear),
        "linear": _remade(tables.linear_summary(linear).markdown(), linear, "--linear "),
        "pack": _remade(tables.pack(packs()).markdown(), packs(), "--pack "),
        "metrics": _remade(tables.metrics(load("metrics")).markdown(), load("metrics"), "--metrics "),
        "no-gain-all": _no_gain_tables(slow, small) if slow or small else losing.markdown(),
    }
    for name in ON_PAGE:
        results = accuracy()[name]
        where, commands = experiments.origin(results), experiments.remake(results)
        paragraphs = (experiments.table(results), experiments.gain(results), experiments.step_times(results))
        made[name] = "\n\n".join([*filter(None, paragraphs), f"Measured on {where}. Remake: {commands}."])
    return made


def gpus(results: list[Result]) -> str:
    """The GPUs of experiments shown on the page."""
    names = sorted({result["gpu"] for result in results if result["experiment"] in ON_PAGE})
    return " and ".join(f"one {name}" for name in names)


def _no_gain_tables(steps: list[Result], small: list[Result]) -> str:
    shown = [tables.end_to_end(steps).markdown()] if steps else []
    shown += [tables.small_linear(small).markdown()] if small else []
    return _remade("\n\n".join(shown), [*steps, *small], "--no-gain ")


def _remade(text: str, results: list[Result], option: str) -> str:
    return f"{text}\n\n{origin(results)} Remake: `{COMMAND} {option}--save`."


def _page(title: str, *paragraphs: str) -> str:
    return "\n\n".join([f"# {title}", *filter(None, paragraphs)]) + "\n"


def outputs() -> dict[Path, str]:
    """Path -> content of everything that is generated from results as text."""
    made = {CARDS / f"linear-{'x'.join(map(str, result['mkn']))}.md": linear_card(result) for result in load("linear")}
    made |= {CARDS / f"{result['card']}.md": end_to_end_card(result) for result in gaining_steps()}
    if load("small-linear") or no_gain_steps():
        made[CARDS / "no-gain.md"] = no_gain_card()
    made |= {CARDS / "pack.md": pack_card(), CARDS / "metrics.md": metrics_card(), **accuracy_cards()}
    return made | filled(PAGES, blocks())


def main() -> int:
    for path, text in outputs().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        print(path.relative_to(ROOT))
    for name, results in accuracy().items():
        (CARDS / f"{name}.png").write_bytes(curves(results))
    picture.write()
    print(picture.TARGET.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
