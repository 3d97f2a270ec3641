"""The tables of every kind of result, drawn from result files old and new; the terminal and the cards show the same.

Headline rows come first and the ratio is next to the time. A limit with a tilde is an estimate (older results, and
pruned activations): see LIMIT.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.linear import ACTIVATION, MVUE, WEIGHT
from benchmarks.models import CARDS
from benchmarks.origin import gpu
from benchmarks.table import Table

Result = dict[str, Any]

LIMIT = (
    "*limit*: the ratio of the same step with its weights packed beforehand, so that pruning and packing cost nothing. "
    "A limit with a tilde is an estimate, not a bound: dense products timed alone, minus sparse products timed alone, "
    "taken off the dense step. Alone, products run at another clock than inside a step, because the GPU is power "
    "limited"
)
BESIDE = "†"
TIMED_BESIDE = "dense was timed beside 2:4, which slows it at the power limit: ratios to it are too high there."
WAYS = {"": "eager", "one thread: ": "eager, one autograd thread", "graph: ": "CUDA graph"}
HEADLINES = ("dense", WEIGHT, MVUE, ACTIVATION)
STEPS = ("dense", "sparse", "per step")
"""Variants of a whole training step: dense, packing at each forward, packing per step."""


def number(value: float | None, digits: int) -> str:
    """value with so many digits, nothing for None."""
    return "" if value is None else f"{value:.{digits}f}"


def size(numbers: Iterable[int]) -> str:
    """4096 x 1024."""
    return " x ".join(map(str, numbers))


def spread(result: Result, name: str | None = None, digits: int = 3) -> str:
    """20th to 80th percentile of a ratio over the rounds; nothing for results that do not have it."""
    found = result.get("ratio_spread", {})
    found = found.get(name, {}) if name else found
    return f"{found['p20']:.{digits}f} to {found['p80']:.{digits}f}" if found else ""


def limit(result: Result, name: str | None = None) -> str:
    """The measured limit, or the estimated one with a tilde."""
    measured = result.get("limit") if name is None else result["limit"].get(name)
    if result.get("limit_method") == "measured":
        estimated = None if name is None else result["limit_estimated"].get(name)
    else:
        measured, estimated = None, measured
    if measured is not None:
        return f"{measured:.3f}"
    return "" if estimated is None else f"~{estimated:.3f}"


def is_fresh(result: Result) -> bool:
    """Whether a result knows dense of before anything sparse ran in its process (benchmarks/fresh.py)."""
    return bool(result.get("fresh_ms"))


def dense_ms(result: Result, name: str, digits: int) -> str:
    """Milliseconds of dense in a fresh process; marked where they are known beside 2:4 alone (benchmarks/fresh.py)."""
    fresh = result.get("fresh_ms", {}).get(name)
    beside = f"{result['times_ms'][name]['median_ms']:.{digits}f}{BESIDE}"
    return beside if fresh is None else f"{fresh:.{digits}f}"


def beside_note(cells: Iterable[Iterable[str]]) -> tuple[str, ...]:
    """What the mark says, where a cell has it."""
    return (f"{BESIDE}: {TIMED_BESIDE}",) if any(cell.endswith(BESIDE) for row in cells for cell in row) else ()


def linear_summary(results: Sequence[Result]) -> Table:
    """Forward + backward of single linears, a row per shape and operand."""
    rows = []
    for result in results:
        times, ratios = result["times_ms"], result["ratio_to_dense"]
        for name in (one for one in (WEIGHT, MVUE, ACTIVATION) if one in times):
            cells = [size(result["mkn"]), name.removeprefix("semisparse ")]
            cells += [dense_ms(result, "dense", 3), f"{times[name]['median_ms']:.3f}"]
            cells += [f"**{ratios[name]:.3f}**", limit(result, name)]
            cells += [f"{ratios[f'{way}{name}']:.3f}" for way in ("one thread: ", "graph: ")]
            rows.append((*cells, gpu(result) if "provenance" in result else ""))
    columns = ("M x K x N", "operand", "dense ms", "2:4 ms", "ratio", "limit", "ratio, one thread", "ratio, CUDA graph")
    return without_empty(Table((*columns, "GPU"), tuple(rows), beside_note(rows)))


def linear_variants(result: Result) -> Table:
    """Whole calls of one linear benchmark: dense and 2:4 in each way of calling, then the rest."""
    times = result["times_ms"]
    names = [f"{way}{name}" for way in WAYS for name in HEADLINES]
    names += [name for name in times if name in result["ratio_to_dense"] and name not in names]
    rows = [
        (
            f"**{name}**" if name in HEADLINES else name,
            f"{times[name]['median_ms']:.4f}",
            f"**{result['ratio_to_dense'][name]:.3f}**",
            spread(result, name),
            limit(result, name),
            *(f"{times[name][key]:.4f}" for key in ("p20_ms", "p80_ms")),
            number((result["peak_memory_bytes"].get(name) or 0) / 2**20 or None, 0),
        )
        for name in names
        if name in times
    ]
    errors = tuple(f"{peer} does not run: {' '.join(error.split())}" for peer, error in result["errors"].items())
    columns = ("whole call", "ms", "dense / this", "p20 to p80", "limit", "p20 ms", "p80 ms", "peak MiB")
    return Table(columns, tuple(rows), errors)


def linear_parts(result: Result) -> Table:
    """Single products and packings of one linear benchmark."""
    rows = tuple(
        (
            name.removeprefix("part: "),
            *(f"{timing[key]:.4f}" for key in ("median_ms", "p20_ms", "p80_ms")),
            number(result["tflops"].get(name), 0),
        )
        for name, timing in result["times_ms"].items()
        if name.startswith(("part: ", "peer"))
    )
    return Table(("part, timed alone", "ms", "p20 ms", "p80 ms", "dense-equivalent TFLOP/s"), rows)


def label(result: Result) -> str:
    """The model and its batch, for the first column: as the card has it today, where there still is one."""
    card = CARDS.get(result["card"])
    return card.label if card else result.get("label") or result["title"]


def models(results: Sequence[Result]) -> Table:
    """How many times faster than dense whole training steps are, packing at each forward and per step."""
    rows = []
    for result in results:
        cells = [label(result), dense_ms(result, "dense", 1)]
        for found in (result, result.get("per_step")):
            cells += [f"**{found['ratio_to_dense']:.3f}**", spread(found, digits=2)] if found else ["", ""]
        rows.append((*cells, gpu(result) if "provenance" in result else ""))
    columns = ("training step", "dense ms", "each", "p20 to p80", "per step", "p20 to p80", "GPU")
    return without_empty(Table(columns, tuple(rows), beside_note(rows)))


def end_to_end(results: Sequence[Result]) -> Table:
    """Times and memory of whole training steps."""
    rows = []
    for result in results:
        times, memory = result["times_ms"], result["peak_memory_bytes"]
        known = [kind for kind in STEPS if kind in memory]
        cells = [label(result), *(number(times.get(kind, {}).get("median_ms"), 1) for kind in STEPS)]
        rows.append((*cells, limit(result), " / ".join(f"{memory[kind] / 2**30:.1f}" for kind in known)))
    errors = tuple(
        f"{label(result)}, {kind}: {' '.join(error.split())}"
        for result in results
        for kind, error in result.get("errors", {}).items()
    )
    columns = ("training step", "dense beside", "each ms", "per step ms", "limit", "peak GiB, in this order")
    return without_empty(Table(columns, tuple(rows), errors))


def losing_rows(results: Sequence[Result]) -> list[tuple[str, float, str, Result]]:
    """(what, ratio, variant of the times, result) of steps and layers that lose."""
    rows = [
        (label(result), result["ratio_to_dense"], "sparse", result)
        for result in results
        if result["kind"] == "end-to-end" and result["ratio_to_dense"] < 1
    ]
    for kind, way in (("linear", ""), ("small-linear", "graph: ")):
        for result in results:
            if result["kind"] == kind and (ratio := result["ratio_to_dense"][f"{way}{WEIGHT}"]) < 1:
                rows.append((f"linear {size(result['mkn'])}, {WAYS[way]}", ratio, f"{way}{WEIGHT}", result))
    return rows


def losing(results: Sequence[Result]) -> Table:
    """Where 2:4 does not help, in short."""
    rows = []
    for name, ratio, variant, result in losing_rows(results):
        times = result["times_ms"]
        base = "dense" if variant == "sparse" else variant.removesuffix(WEIGHT) + "dense"
        cells = [name, dense_ms(result, base, 2), f"{times[variant]['median_ms']:.2f}", f"**{ratio:.2f}**"]
        rows.append((*cells, spread(result, None if variant == "sparse" else variant), gpu(result)))
    columns = ("forward + backward, steps with optimizer", "dense ms", "2:4 ms", "dense / 2:4", "p20 to p80", "GPU")
    return without_empty(Table(columns, tuple(rows), beside_note(rows)))


def small_linear(results: Sequence[Result]) -> Table:
    """Single linears around the size from which 2:4 pays, smallest first."""
    rows = []
    for result in sorted(results, key=lambda result: result["mkn"][0] * result["mkn"][1] * result["mkn"][2]):
        times, ratios, graph = result["times_ms"], result["ratio_to_dense"], f"graph: {WEIGHT}"
        cells = [size(result["mkn"]), dense_ms(result, "dense", 3), f"{times[WEIGHT]['median_ms']:.3f}"]
        cells += [f"**{ratios[WEIGHT]:.3f}**", spread(result, WEIGHT)]
        rows.append((*cells, f"**{ratios[graph]:.3f}**", spread(result, graph)))
    columns = ("M x K x N", "dense ms", "2:4 ms", "ratio, eager", "p20 to p80", "ratio, CUDA graph", "p20 to p80")
    return Table(columns, tuple(rows), beside_note(rows))


def pack(results: Sequence[Result]) -> Table:
    """The pack kernel by size, against a copy and torch's tile op."""
    rows = []
    for result in results:
        times = result["microseconds"]
        cells = [size(result["nk"]), f"{times['pack']:.1f}", f"{times['copy']:.1f}", f"{result['rate_of_copy']:.1%}"]
        rows.append((*cells, f"{times['torch tile op']:.1f}", f"{result['faster_than_tile_op']:.2f}"))
    columns = ("N x K", "pack us", "copy us", "share of the copy's rate", "tile op us", "tile op / pack")
    return Table(columns, tuple(rows))


def metrics(results: Sequence[Result]) -> Table:
    """What following the masks costs."""
    rows = []
    for result in results:
        times = [f"{timing['median_ms']:.2f}" for timing in result["times_ms"].values()]
        cells = [label(result), str(result["layers"]), str(result["interval"]), *times]
        rows.append((*cells, f"{result['share_of_step']:.3%}", f"{result['peak_memory_bytes'] / 2**20:.0f}"))
    columns = ("training step", "layers", "interval", "step ms", "metrics per interval ms", "share", "peak MiB")
    return Table(columns, tuple(rows))


def without_empty(table: Table) -> Table:
    """The table without columns that have no cell filled."""
    kept = [place for place in range(len(table.columns)) if any(row[place] for row in table.rows)]
    rows = tuple(tuple(row[place] for place in kept) for row in table.rows)
    return Table(tuple(table.columns[place] for place in kept), rows, table.notes)


def parts_of_whole(results: Sequence[Result]) -> tuple[float, float]:
    """Least and largest share of a whole dense or 2:4 call that its parts, timed alone, add up to."""
    shares = []
    for result in results:
        times = {name.removeprefix("part: "): timing["median_ms"] for name, timing in result["times_ms"].items()}
        shared = times["dense grad_weight"] + times["bias grad"]
        shares.append((shared + times["dense forward"] + times["dense grad_input"]) / times["graph: dense"])
        packed = times["pack weight"] + times["sparse forward"] + times["sparse grad_input"]
        shares.append((shared + packed) / times[f"graph: {WEIGHT}"])
    return min(shares), max(shares)


def limit_note(results: Sequence[Result]) -> str:
    """What the limit is, and how exact its estimate, from the results of single linears."""
    low, high = (f"{share:.0%}" for share in parts_of_whole(results))
    added = low if low == high else f"{low} to {high}"
    return f"{LIMIT} (parts timed alone add up to {added} of the whole call)."
