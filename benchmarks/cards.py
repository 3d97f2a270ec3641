"""Cards and README figures, generated from benchmarks/results/*.json. Run after each new result; a test compares.

python benchmarks/cards.py
"""

import json
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

from semisparse_lab.report import cards as experiments
from semisparse_lab.report.curves import curves

ROOT = Path(__file__).resolve().parent.parent
RESULTS, CARDS = ROOT / "benchmarks" / "results", ROOT / "benchmarks" / "cards"
ACCURACY = RESULTS / "accuracy"
MASK_STUDY = ("signed-greedy", "greedy", "sparse-100")
IN_README = ("vit-fashion-mnist", "vit-fashion-mnist-long", "dino-fashion-mnist", "gpt-stdlib")
COMMAND = "python benchmarks/benchmark_semi_structured_training.py"


def load(kind: str) -> list[tuple[str, dict[str, Any]]]:
    """(file name, content) of the stored results of one kind, in a fixed order."""
    found = []
    for path in sorted(RESULTS.glob("*.json")):
        content = json.loads(path.read_text())
        if content.get("kind") == kind:
            found.append((path.name, content))
    return found


def origin(results: list[dict[str, Any]]) -> str:
    """What the figures were measured on: machine and versions, then each commit with the time of its first result."""
    runs: dict[str, dict[str, str]] = {}
    for source in (result["provenance"] for result in results):
        facts = source["environment"]["facts"]
        named = ", ".join(f"{name} {facts[name]}" for name in ("torch", "triton", "cuSPARSELt", "nvmath-python"))
        peaks = " / ".join(f"{value:g} TFLOP/s {name}" for name, value in source["peaks_tflops"].items())
        machine = f"One {source['gpu']}, {named}" + (f"; peaks by data sheet: {peaks}" if peaks else "")
        runs.setdefault(machine, {}).setdefault(f"commit {source['commit'][:10]}", source["time"])
    return " ".join(
        f"{machine}; {'; '.join(f'{commit}, {time}' for commit, time in times.items())}."
        for machine, times in runs.items()
    )


def linear_table(results: list[tuple[str, dict[str, Any]]]) -> str:
    """Dense and sparse forward + backward of single linears, with limits."""
    lines = [
        "| M x K x N | operand | dense ms | 2:4 ms | ratio (limit) | ratio, one autograd thread | ratio, CUDA graph |",
        "|---|---|---|---|---|---|---|",
    ]
    for _, result in results:
        times, ratio, limit = result["times_ms"], result["ratio_to_dense"], result["limit"]
        for name in ("semisparse weight", "semisparse activation"):
            cells = [" x ".join(map(str, result["mkn"])), name.removeprefix("semisparse ")]
            cells += [f"{times[kind]['median_ms']:.3f}" for kind in ("dense", name)]
            cells += [f"**{ratio[name]:.3f}** ({limit[name]:.3f})"]
            cells += [f"{ratio[f'{way}: {name}']:.3f}" for way in ("one thread", "graph")]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def end_to_end_table(results: list[tuple[str, dict[str, Any]]]) -> str:
    """Whole training steps, dense against sparse, with limits."""
    lines = ["| step | dense ms | 2:4 ms | ratio (limit) | peak GiB dense / 2:4 |", "|---|---|---|---|---|"]
    for _, result in results:
        times, memory = result["times_ms"], result["peak_memory_bytes"]
        lines.append(
            f"| {result['title']} | {times['dense']['median_ms']:.1f} | {times['sparse']['median_ms']:.1f} "
            f"| **{result['ratio_to_dense']:.3f}** ({result['limit']:.3f}) "
            f"| {memory['dense'] / 2**30:.1f} / {memory['sparse'] / 2**30:.1f} |"
        )
    return "\n".join(lines)


def linear_card(name: str, result: dict[str, Any]) -> str:
    """Every variant and part of one linear benchmark."""
    tokens, in_features, out_features = result["mkn"]
    lines = [
        f"# One linear layer, M x K x N = {tokens} x {in_features} x {out_features}",
        "",
        origin([result]),
        "",
        "Forward + backward in eager mode, bf16 parameters with bias, gradients set to None before each call, "
        "packing included. Variants interleaved in one process, sustained. The limit is the ratio that a free "
        "packing would reach with this run's own products.",
        "",
        "| variant | ms | p20 | p80 | dense / variant | limit | dense-equivalent TFLOP/s |",
        "|---|---|---|---|---|---|---|",
    ]
    for variant, timing in result["times_ms"].items():
        ratio, limit, rate = (result[key].get(variant) for key in ("ratio_to_dense", "limit", "tflops"))
        cells = [variant, *(f"{timing[key]:.4f}" for key in ("median_ms", "p20_ms", "p80_ms"))]
        cells += ["" if value is None else f"{value:.3f}" for value in (ratio, limit)]
        lines.append(f"| {' | '.join([*cells, '' if rate is None else f'{rate:.0f}'])} |")
    lines += [f"| {peer} | {error} | | | | | |" for peer, error in result["errors"].items()]
    shape = f"{tokens},{in_features},{out_features}"
    return "\n".join([*lines, "", f"Remake: `{COMMAND} --linear --mkn {shape} --save`", ""])


def end_to_end_card(name: str, result: dict[str, Any]) -> str:
    """One whole training step."""
    spread = {kind: f"{t['p20_ms']:.1f} to {t['p80_ms']:.1f}" for kind, t in result["times_ms"].items()}
    saved = ", ".join(f"{shape}: {ms:.2f} ms" for shape, ms in result["saved_by_products_ms"].items())
    return "\n".join(
        [
            f"# {result['title']}",
            "",
            origin([result]),
            "",
            end_to_end_table([(name, result)]),
            "",
            f"p20 to p80: dense {spread['dense']}, 2:4 {spread['sparse']} ms. "
            f"{result['swapped']} linears 2:4. The products of these layers save, packing not counted "
            f"({saved} by N x K); the limit is the ratio if packing cost nothing.",
            *(["", result["note"]] if result["note"] else []),
            "",
            f"Remake: `{COMMAND} --card {result['card']} --save`",
            "",
        ]
    )


def pack_card(results: list[tuple[str, dict[str, Any]]]) -> str:
    """The pack kernel at all its sizes."""
    lines = [
        "# Packing a weight in both directions, bf16",
        "",
        origin([result for _, result in results]),
        "",
        "Cold L2 cache, calls replayed from a CUDA graph. The copy moves as many bytes as packing does; the tile op is "
        "`torch._sparse_semi_structured_tile`.",
        "",
        "| N x K | pack us | copy us | share of the copy's rate | tile op us | tile op / pack |",
        "|---|---|---|---|---|---|",
    ]
    for _, result in results:
        times = result["microseconds"]
        cells = [" x ".join(map(str, result["nk"])), f"{times['pack']:.1f}", f"{times['copy']:.1f}"]
        cells += [f"{result['rate_of_copy']:.1%}", f"{times['torch tile op']:.1f}"]
        lines.append(f"| {' | '.join(cells)} | {result['faster_than_tile_op']:.2f} |")
    return "\n".join([*lines, "", f"Remake: `{COMMAND} --pack --save`", ""])


def metrics_card(results: list[tuple[str, dict[str, Any]]]) -> str:
    """The cost of following the masks."""
    lines = [
        "# Following the masks: MaskMetrics at its default interval",
        "",
        origin([result for _, result in results]),
        "",
        "The metrics of an interval are two mask computations and one set of statistics for all sparse layers, timed "
        "back to back on their own and compared with the steps of the interval.",
        "",
        "| step | layers | interval | step ms | metrics of an interval ms | share of the time | peak MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for _, result in results:
        times = [f"{timing['median_ms']:.2f}" for timing in result["times_ms"].values()]
        cells = [result["title"], str(result["layers"]), str(result["interval"]), *times]
        cells += [f"{result['share_of_step']:.3%}", f"{result['peak_memory_bytes'] / 2**20:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"Remake: `{COMMAND} --metrics --save`", ""])


@cache
def accuracy() -> dict[str, list[dict[str, Any]]]:
    """Stored results of the experiments in examples/, by experiment; read once."""
    return experiments.by_experiment(experiments.load_results(ACCURACY))


def mask_study(results: list[dict[str, Any]]) -> str:
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


def readme_blocks() -> dict[str, str]:
    """Marker -> generated text of each README block that has results; the other experiments have their cards alone."""
    linear, steps = load("linear"), load("end-to-end")
    blocks = {}
    if steps:
        where = origin([result for _, result in steps])
        blocks["end-to-end"] = f"{end_to_end_table(steps)}\n\n{where} Remake: `{COMMAND} --save`."
    if linear:
        where = origin([result for _, result in linear])
        blocks["linear"] = f"{linear_table(linear)}\n\n{where} Remake: `{COMMAND} --linear --save`."
    for name in IN_README:
        results = accuracy()[name]
        where, commands = experiments.origin(results), experiments.remake(results)
        blocks[name] = f"{experiments.table(results)}\n\nMeasured on {where}. Remake: {commands}."
    return blocks


def with_blocks(text: str, blocks: dict[str, str]) -> str:
    """text with the content between <!-- generated: NAME --> and <!-- end --> replaced by each block."""
    for name, block in blocks.items():
        pattern = re.compile(rf"(<!-- generated: {name} -->\n).*?(<!-- end -->)", flags=re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"README.md has no <!-- generated: {name} --> ... <!-- end -->")
        text = pattern.sub(lambda found, block=block: f"{found[1]}{block}\n{found[2]}", text)
    return text


def outputs() -> dict[Path, str]:
    """Path -> content of everything that is generated from results."""
    made = {CARDS / f"{Path(name).stem}.md": linear_card(name, result) for name, result in load("linear")}
    made |= {CARDS / f"{Path(name).stem}.md": end_to_end_card(name, result) for name, result in load("end-to-end")}
    if packs := sorted(load("pack"), key=lambda found: found[1]["nk"]):
        made[CARDS / "pack.md"] = pack_card(packs)
    if followed := load("metrics"):
        made[CARDS / "metrics.md"] = metrics_card(followed)
    made |= accuracy_cards()
    readme = ROOT / "README.md"
    return {**made, readme: with_blocks(readme.read_text(), readme_blocks())}


def main() -> int:
    for path, text in outputs().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        print(path.relative_to(ROOT))
    for name, results in accuracy().items():
        (CARDS / f"{name}.png").write_bytes(curves(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
