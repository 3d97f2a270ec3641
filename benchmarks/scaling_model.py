"""A model of step times on 8 to 1,024 GPUs, from what benchmarks.scaling measured on a few. Not a measurement.

    python -m benchmarks.scaling_model benchmarks/results/scaling-2.json --between 50

What is taken from the result file, per variant: compute C (the measured step without its exposed communication, in ms),
the bytes of weights that a step gathers and of gradients that it reduces, the number of layers L, and the rate at which
collectives of a block's size move bytes. With n GPUs, a collective of B bytes that every GPU ends with takes

    t(B) = B (n - 1) / n / rate,

twice that for an all-reduce. Forward compute is C / 3, backward compute 2 C / 3, both the same for each layer.

FSDP2, with g = t(gathered / 2 L) and r = t(reduced / L), gathers the next layer and reduces the last one while it
computes one; the first gather and the last reduction have nothing to hide behind:

    step = C + g + (L - 1) max(0, g - C / 3 L) + (L - 1) max(0, g + r - 2 C / 3 L) + r.

DDP reduces while the backward computes, but for the last of L parts, with a = t(reduced) of an all-reduce:

    step = C + max(a / L, a - 2 C / 3 (L - 1) / L).

Up to 8 GPUs share a host and the measured rate; beyond, the rate is at most that between hosts (--between, gigabytes
per second and GPU), which is an assumption. What the measured step took beyond these formulas at its own number of GPUs
(latency, ranks that wait for each other) is added at every number. Congestion, slow GPUs, and the share of an optimizer
step that falls with n are not in the model.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.table import Table

Result = dict[str, Any]

RANKS = (8, 16, 32, 64, 128, 256, 512, 1024)
PER_HOST = 8
BETWEEN = 50.0
"""Gigabytes per second and GPU between hosts: 400 Gbit/s for each, assumed."""
ALONE = "one GPU"
DDP = "DDP"


def rate(result: Result, kind: str, size: float) -> float:
    """Bytes per millisecond and GPU of a collective alone, at the measured size nearest to size."""
    measured = result["collectives_ms"][kind]
    nearest = min(measured, key=lambda one: abs(float(one) - size))
    ranks = result["ranks"]
    passes = 2 if kind == "all-reduce" else 1
    moved = passes * float(nearest) * (ranks - 1) / ranks
    return float(moved / measured[nearest])


def moved(result: Result, variant: Result) -> tuple[float, float]:
    """Bytes of all weights that a step gathers, and of all gradients that it reduces."""

    def given(kind: str) -> float:
        return float(sum(size for name, size in variant["bytes_per_step"].items() if name.startswith(kind)))

    if variant["layout"] == DDP:
        return 0.0, given("allreduce")
    return given("allgather") * result["ranks"], given("reduce_scatter")  # of a gather a rank gives its shard


def predicted_ms(result: Result, variant: Result, ranks: int, between: float = BETWEEN) -> float:
    """The step of a variant on ranks GPUs, as the module says: by its formulas, and what was measured beyond them.

    Args:
        result: Of benchmarks.scaling, on two or more GPUs.
        variant: One of its variants.
        ranks: GPUs.
        between: Gigabytes per second and GPU between hosts.
    """
    beyond = variant["median_ms"] - formula_ms(result, variant, result["ranks"], between)
    return formula_ms(result, variant, ranks, between) + max(0.0, beyond)


def formula_ms(result: Result, variant: Result, ranks: int, between: float = BETWEEN) -> float:
    """The step of a variant on ranks GPUs by the formulas alone.

    Args:
        result: Of benchmarks.scaling, on two or more GPUs.
        variant: One of its variants.
        ranks: GPUs.
        between: Gigabytes per second and GPU between hosts.
    """
    compute = variant["median_ms"] - variant["exposed_ms"]
    if variant["layout"] == ALONE or ranks == 1:
        return float(compute)
    layers, (gathered, reduced) = result["model"]["depth"], moved(result, variant)

    def time(kind: str, size: float) -> float:
        fastest = rate(result, kind, size)
        reached = fastest if ranks <= PER_HOST else min(fastest, between * 1e6)
        return size * (ranks - 1) / ranks / reached

    if variant["layout"] == DDP:
        whole = 2 * layers * time("all-reduce", reduced / layers)
        return float(compute + max(whole / layers, whole - 2 * compute / 3 * (layers - 1) / layers))
    gather, reduction = time("all-gather", gathered / layers / 2), time("reduce-scatter", reduced / layers)
    forward = compute / 3 / layers
    waits = max(0.0, gather - forward) + max(0.0, gather + reduction - 2 * forward)
    return float(compute + gather + (layers - 1) * waits + reduction)


def table(result: Result, ranks: Sequence[int] = RANKS, between: float = BETWEEN) -> Table:
    """Tokens per second and GPU in thousands, modelled; first how well the formulas alone give the measured step."""
    here = result["ranks"]
    columns = ("modelled, by GPUs", "layout", f"formulas on {here} / measured", *map(str, ranks))
    rows = []
    for variant in result["variants"]:
        if variant["layout"] == ALONE:
            continue
        known = formula_ms(result, variant, here, between) / variant["median_ms"]
        times = [predicted_ms(result, variant, count, between) for count in ranks]
        rates = [f"{result['tokens_per_rank'] / time:.1f}" for time in times]  # tokens per ms are thousands per second
        rows.append((variant["precision"], variant["layout"], f"{known:.2f}", *rates))
    return Table(columns, tuple(rows))


def note(between: float = BETWEEN) -> str:
    """What the table is, below it."""
    return (
        "A model, not a measurement: thousands of tokens per second and GPU from the measured compute, bytes and "
        "rates; what the measured step took beyond the formulas is added. "
        f"Beyond {PER_HOST} GPUs it assumes at most {between:g} GB/s per GPU between hosts; congestion is left out. "
        "`benchmarks/scaling_model.py` has the formulas."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, help="of benchmarks.scaling on two or more GPUs")
    parser.add_argument("--between", type=float, default=BETWEEN, help="GB/s per GPU between hosts")
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS)
    given = parser.parse_args()
    result = json.loads(given.result.read_text())
    print(table(result, given.ranks, given.between).text())
    print(note(given.between))


if __name__ == "__main__":
    main()
