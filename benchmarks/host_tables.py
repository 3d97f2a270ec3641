"""The tables of host time, of packing at each forward beside packing per step, and of all packs of a model."""

from collections.abc import Sequence
from typing import Any

from benchmarks.host import BOTH, DENSE, EACH, FORWARD, PACKED, PER_STEP
from benchmarks.host_parts import DENSE as DENSE_LAYER
from benchmarks.host_parts import EXPLAINED, PACK, WHOLE
from benchmarks.origin import gpu
from benchmarks.table import Table
from benchmarks.tables import beside_note, dense_ms

Result = dict[str, Any]


def host_time(result: Result) -> Table:
    """Host time per layer of the stack, and its ratio to nn.Linear."""
    rows = []
    for mode, passes in result["us_per_layer"].items():
        for name in (FORWARD, BOTH):
            for kind in (DENSE, EACH, PER_STEP, PACKED):
                if (found := passes[name].get(kind)) is None:
                    continue
                ratio = found["ratio"]
                cells = [f"{mode}, {name}: {kind}", f"{found['median']:.1f}", _range(found, 1)]
                compared = ("", "", "") if kind == DENSE else (_bold(ratio), _range(ratio, 2), _native(found))
                rows.append((*cells, *compared))
    columns = ("host time per layer", "us", "p20 to p80", "x nn.Linear", "p20 to p80", "in C++")
    return Table(columns, tuple(rows))


def parts(result: Result) -> Table:
    """Where the host time of one eager layer goes."""
    whole, dense = (result["timed"][name]["median"] for name in (WHOLE, DENSE_LAYER))
    rows = [(name, f"{us:.1f}", f"{us / whole:.0%}", EXPLAINED[name]) for name, us in result["parts"].items()]
    rows += [
        ("for comparison: pack op", f"{result['timed'][PACK]['median']:.1f}", "", "alone, as a pack per layer costs")
    ]
    rows += [("**all**", f"**{whole:.1f}**", "100%", f"nn.Linear: {dense:.1f} us")]
    return Table(("forward + backward of one eager layer", "us", "share", "what it is"), tuple(rows))


def eager_linear(results: Sequence[Result]) -> Table:
    """Single eager linears."""
    rows = []
    for result in results:
        times, ratios, spreads = result["times_ms"], result["ratio_to_dense"], result["ratio_spread"]
        cells = [" x ".join(map(str, result["mkn"])), dense_ms(result, "dense", 3)]
        for kind in (EACH, PER_STEP):
            cells += [f"{times[kind]['median_ms']:.3f}", f"**{ratios[kind]:.3f}**", _range(spreads[kind], 3)]
        rows.append((*cells, gpu(result) if "provenance" in result else ""))
    columns = ("M x K x N", "dense ms", "each ms", "dense / each", "p20 to p80")
    return Table((*columns, "step ms", "dense / step", "p20 to p80", "GPU"), tuple(rows), beside_note(rows))


def pack_together(results: Sequence[Result]) -> Table:
    """All packs of a model, against the rate of one large pack."""
    rows = []
    for result in results:
        for name, ideal in result["times_ideal"].items():
            what = f"{result['model']}, {result['weights']} weights, {name}"
            cells = [what, f"{result['times_ms'][name]['median_ms']:.3f}", f"{result['bytes_moved'] / 1e6:.0f}"]
            rows.append(
                (*cells, f"{result['bytes_per_second_of_one_pack'] / 1e12:.2f}", _bold(ideal), _range(ideal, 2))
            )
    n, k = results[0]["largest_nk"] if results else (0, 0)
    columns = ("packed together", "ms", "MB moved", f"TB/s of {n} x {k}", "times ideal", "p20 to p80")
    return Table(columns, tuple(rows))


def _native(found: dict[str, Any]) -> str:
    """Older results had no masked-dense products in C++."""
    sparse, dense = found["native_products"], found.get("native_dense_products", 0)
    return f"{sparse} sparse, {dense} dense" if dense else str(sparse)


def _bold(found: dict[str, float]) -> str:
    return f"**{found['median']:.2f}**"


def _range(found: dict[str, float], digits: int) -> str:
    """20th to 80th percentile with that many decimals; fewer where the figure has more than 4 digits otherwise."""
    shown = [f"{value:.{max(0, min(digits, 4 - len(str(int(value)))))}f}" for value in (found["p20"], found["p80"])]
    return " to ".join(shown)
