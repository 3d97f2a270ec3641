"""The card, the block and the picture of benchmarks.scaling, from the results of all numbers of GPUs."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import scaling_model
from benchmarks.origin import gpu, origin
from benchmarks.store import CARDS, ROOT, load
from benchmarks.table import Table
from semisparse_lab.report import style

Result = dict[str, Any]

PICTURE = ROOT / "docs" / "img" / "scaling.svg"
SLOW = "NCCL_P2P_DISABLE"
THROUGH_HOST = f"With `{SLOW}=1`, GPUs exchange data through the host's memory, about as slowly as between hosts:"
COMMAND = "NCCL_NVLS_ENABLE=0 torchrun --nproc-per-node RANKS -m benchmarks.scaling --out benchmarks/results"
MISSING = f"Not measured yet: `{COMMAND}`."
PRECISIONS = ("bf16", "2:4", "fp8 + 2:4")
MARKERS = {scaling_model.ALONE: "*", "DDP": "s", "FSDP2": "o", "FSDP2, compressed": "^"}
COLUMNS = (
    "precision", "layout", "GPUs", "step ms", "1,000 tokens/s/GPU", "of one GPU", "collectives ms", "exposed", "GB",
    "losses",
)  # fmt: skip
NOTE = (
    "*of one GPU*: step of the same model and precision on one GPU without communication / this step. *exposed*: time "
    "in which a GPU runs kernels of collectives and nothing else, by the profiler, on the first GPU. *GB*: peak, with "
    "weights and states. *losses*: largest relative difference to DDP over the first steps; 0 is equal bit for bit. "
    "bf16 runs first, before any sparse product. Where the depth was searched in the same process, 2:4 had run before "
    "it, and its first variant is as slow at the start as at the end."
)


def by_ranks(slow: bool = False) -> list[Result]:
    """The stored results over direct links between GPUs, or over slow ones (SLOW), fewest GPUs first."""
    found = [result for result in load("scaling") if (SLOW in result["nccl"]) == slow]
    return sorted(found, key=lambda result: result["ranks"])


def found(result: Result, precision: str, layout: str) -> Result | None:
    """A variant of a result."""
    fitting = (one for one in result["variants"] if (one["precision"], one["layout"]) == (precision, layout))
    return next(fitting, None)


def difference(result: Result, variant: Result) -> float | None:
    """Largest relative difference of losses to DDP's; None if nothing was compared."""
    other = found(result, variant["precision"], scaling_model.DDP)
    if other is None or variant["layout"] == scaling_model.ALONE or variant is other:
        return None
    return max(abs(one / two - 1) for one, two in zip(variant["losses"], other["losses"], strict=True))


def table(results: Sequence[Result]) -> Table:
    """Each variant on each number of GPUs."""
    rows = []
    for result in results:
        for one in result["variants"]:
            alone, apart = found(result, one["precision"], scaling_model.ALONE), difference(result, one)
            share = "" if alone is None or alone is one else f"{alone['median_ms'] / one['median_ms']:.3f}"
            rows.append((
                one["precision"], one["layout"], str(result["ranks"]), f"{one['median_ms']:.1f}",
                f"{one['tokens_per_second_and_gpu'] / 1000:.1f}", share, f"{one['collectives_ms']:.1f}",
                f"{one['exposed_ms']:.1f}", f"{one['peak_bytes'] / 1e9:.1f}", "" if apart is None else f"{apart:.1e}",
            ))  # fmt: skip
    return Table(COLUMNS, tuple(rows))


def setup(result: Result) -> str:
    """What was run, in a sentence."""
    model = result["model"]
    how, gpus = "compiled" if result["compiled"] else "eager", "GPU" if result["ranks"] == 1 else "GPUs"
    drift = result.get("again_ms", result["variants"][0]["median_ms"]) / result["variants"][0]["median_ms"] - 1
    return (
        f"{result['ranks']} {gpus}: Llama-style {model['width']}/{model['hidden']}, {model['depth']} layers, "
        f"{result['tokens_per_rank']:,} tokens per GPU, bf16 weights and AdamW states, blocks {how}; the first "
        f"variant, timed again at the end, took {100 * drift:+.1f} %."
    )


def text(results: Sequence[Result]) -> str:
    """Tables, what they mean, and the model of more GPUs from the result with most."""
    parts = [table(results).markdown(), NOTE, " ".join(setup(result) for result in results)]
    if slow := by_ranks(slow=True):
        parts += [THROUGH_HOST, table(slow).markdown(), " ".join(setup(result) for result in slow)]
    if results[-1]["ranks"] > 1:
        parts += [scaling_model.table(results[-1]).markdown(), scaling_model.note()]
    measured = origin(results, f"Up to {results[-1]['ranks']} of one host, each an")
    return "\n\n".join([*parts, f"{measured} Remake: `{COMMAND}`."])


def short() -> str:
    """For README: what each precision is worth on most GPUs, in a sentence."""
    results = by_ranks()
    if not results or results[-1]["ranks"] < 2:
        return MISSING
    last = results[-1]
    gains = []
    for layout in (scaling_model.DDP, "FSDP2"):
        dense = found(last, PRECISIONS[0], layout)
        others = ((name, found(last, name, layout)) for name in PRECISIONS[1:])
        worth = ", ".join(
            f"{name} **{dense['median_ms'] / one['median_ms']:.2f}**" for name, one in others if dense and one
        )
        gains.append(f"{layout}: {worth}")
    model = f"Llama-style {last['model']['width']}/{last['model']['hidden']}, {last['model']['depth']} layers"
    return (
        f"On {last['ranks']} {gpu(last)} of one host ({model}; time of dense bf16 / time of each): {'; '.join(gains)}."
    )


def block() -> str:
    """For docs/speed.md."""
    results = by_ranks()
    return f"![Tokens per second and GPU](img/{PICTURE.name})\n\n{text(results)}" if results else MISSING


def cards() -> dict[Path, str]:
    """The card, if there are results."""
    results = by_ranks()
    head = "# Training on several GPUs: DDP, FSDP2 and compressed all-gathers"
    return {CARDS / "scaling.md": f"{head}\n\n{text(results)}\n"} if results else {}


def points(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Measured tokens per second and GPU of each variant, with the file, "one GPU" of a lone one; and modelled ones."""
    made = [
        {
            "label": f"{one['precision']}, {one['layout']}",
            "ranks": result["ranks"],
            "rate": round(one["tokens_per_second_and_gpu"]),
            "file": result["file"],
        }
        for result in results
        for one in result["variants"]
        if one["layout"] != scaling_model.ALONE or result["ranks"] == 1
    ]
    last = results[-1]
    for one in last["variants"] if last["ranks"] > 1 else []:
        for ranks in scaling_model.RANKS:
            if one["layout"] != scaling_model.ALONE and ranks > last["ranks"]:
                rate = 1000 * last["tokens_per_rank"] / scaling_model.predicted_ms(last, one, ranks)
                label = f"{one['precision']}, {one['layout']}"
                made.append({"label": label, "ranks": ranks, "rate": round(rate), "modelled": True})
    return made


def write(results: Sequence[Result], target: Path = PICTURE) -> None:
    """Draw points, if there are any: measured ones as marks, modelled ones as dotted lines."""
    if not results:
        return
    shown = points(results)
    with style.figure(4.5) as figure:
        axes = figure.subplots()
        for label in dict.fromkeys(point["label"] for point in shown):
            precision, layout = label.split(", ", 1)
            how = {"color": style.COLOURS[PRECISIONS.index(precision)], "marker": MARKERS[layout]}
            own = [point for point in shown if point["label"] == label]
            for modelled, line in (
                (False, {"linestyle": "-", "label": label}),
                (True, {"linestyle": ":", "mfc": "none"}),
            ):
                part = [point for point in own if ("modelled" in point) == modelled]
                axes.plot([one["ranks"] for one in part], [one["rate"] for one in part], **how, **line)
        ranks = sorted({point["ranks"] for point in shown})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ranks, [str(count) for count in ranks])
        axes.set_ylim(bottom=0)
        axes.set_xlabel("GPUs (filled marks are measured; hollow ones, with dotted lines, are a model)")
        axes.set_ylabel("tokens per second and GPU")
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize="small")
        target.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(target, format="svg", metadata={"Date": None, "Description": json.dumps(shown)})
