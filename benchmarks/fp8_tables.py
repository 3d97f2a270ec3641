"""Tables of fp8: layers between pointwise neighbours, noise of rounding, and where the time of a step goes."""

from collections.abc import Sequence
from typing import Any

from benchmarks.compare import DENSE
from benchmarks.compare_tables import mark, slowed_note
from benchmarks.fp8_kernels import LARGEST
from benchmarks.neighbours import ALONE
from benchmarks.origin import gpu
from benchmarks.step_profile import (
    AMAX,
    DENSE_FP8,
    PACKING,
    PRODUCTS,
    RESCALING,
    ROUNDING,
    SAMPLING,
    SPARSE,
    by_kind,
)
from benchmarks.table import Table
from benchmarks.tables import BESIDE, beside_note

Result = dict[str, Any]
BETWEEN = (
    "silu -> linear -> silu, forward + backward, compiled; the two silu alone are timed beside it and taken off. "
    "*dense / this* above 1 means faster than dense bf16 before anything sparse ran, unless the ratio is marked."
)
NOISE = (
    "Signal to noise against fp64, in decibels; more is better. Both multiply the same masked weight. *spread*: "
    "gradients whose magnitudes spread as e^(2 n)."
)
KERNELS = (
    "The passes of fp8 over a bf16 matrix, with a cold L2 cache. Each pass after the one for the largest magnitude is "
    "the whole op less that one."
)
PROFILE = (
    "Milliseconds of the GPU per training step, by kind of kernel, from torch.profiler; under the profiler steps take "
    "a little longer. Floors: FLOPs at the data sheet's peak, bytes at its bandwidth."
)


def neighbours(results: Sequence[Result]) -> Table:
    """A line per shape and row."""
    lines = []
    for result in results:
        times, spread = result["times_ms"], result["ratio_spread"]
        alone, fresh = times[ALONE]["median_ms"], result.get("fresh_ms")
        for name in [DENSE, *(name for name in times if name not in (DENSE, ALONE))]:
            one = spread[name]
            value = f"{one['median']:.3f}{mark(result, name)}"
            ratio = ("", "") if name == DENSE else (value, f"{one['p20']:.3f} to {one['p80']:.3f}")
            ms = f"{times[name]['median_ms'] - alone:.3f}"
            if name == DENSE:
                ms = f"{fresh[DENSE] - fresh[ALONE]:.3f}" if fresh else f"{ms}{BESIDE}"
            lines.append((_shape(result), name, ms, *ratio))
    return Table(
        ("M x K x N", "row", "ms", "dense / this", "p20 to p80"),
        tuple(lines),
        (*beside_note(lines), *slowed_note(lines)),
    )


def noise(results: Sequence[Result]) -> Table:
    """A line per shape, gradient and row."""
    lines = [
        (_shape(result), gradient, row, *(f"{found[key]:.2f}" if key in found else "" for key in ("y", "dx", "dW")))
        for result in results
        for gradient, rows in result["decibels"].items()
        for row, found in rows.items()
    ]
    return Table(("M x K x N", "gradient", "row", "y", "dx", "dW"), tuple(lines))


def kernels(results: Sequence[Result]) -> Table:
    """A line per size and pass."""
    lines = []
    for result in results:
        us = {LARGEST: result["microseconds"][LARGEST], **result["second_pass_microseconds"]}
        what = " x ".join(map(str, result["mn"]))
        lines += [(what, name, f"{us[name]:.1f}", f"{result['rate_of_copy'][name]:.1%}") for name in us]
    return Table(("M x N", "pass", "us", "share of the copy's rate"), tuple(lines))


def profiles(results: Sequence[Result]) -> str:
    """What is measured, then a table per result."""
    return "\n\n".join([PROFILE, *(profile(result).markdown() for result in results)])


def profile(result: Result) -> Table:
    """A line per kind of kernel, a column per row; the GPU at the top."""
    rows = {name: by_kind(row) for name, row in result["rows"].items()}
    kinds = sorted({kind for row in rows.values() for kind in row}, key=lambda kind: -_most(rows, kind))
    lines = [(kind, *(f"{row.get(kind, 0):.1f}" for row in rows.values())) for kind in kinds]
    lines.append(("all kernels", *(f"{row['total_ms']:.1f}" for row in result["rows"].values())))
    notes = [f"floor of {name}: {ms:.1f} ms" for name, ms in result["floors_ms"].items()] + remaining(result)
    where = f", {gpu(result)}" if "provenance" in result else ""
    return Table((f"{result['label']}, ms{where}", *rows), tuple(lines), tuple(notes))


def remaining(result: Result) -> list[str]:
    """How far the fastest row in fp8 is from its floors, and what it could still avoid; nothing without such a row."""
    rows = {name: by_kind(row) for name, row in result["rows"].items()}
    in_fp8 = [name for name, row in rows.items() if row.get(SPARSE) and row.get(ROUNDING)]
    if not in_fp8 or DENSE not in rows:
        return []
    name = min(in_fp8, key=lambda one: result["rows"][one]["total_ms"])
    row, floors = rows[name], result["floors_ms"]
    two, three = floors["two fp8 products with 2:4"], floors["three bf16 products"]
    sparse = row[SPARSE] / (two if row.get(DENSE_FP8) else 1.5 * two)
    head = row.get(PRODUCTS, 0.0)  # what no row swaps
    dense = (rows[DENSE][PRODUCTS] - head) / three
    added = {kind: row[kind] for kind in (AMAX, ROUNDING, SAMPLING, PACKING, RESCALING) if row.get(kind)}
    tokens = sum(row.get(kind, 0.0) for kind in (AMAX, ROUNDING, SAMPLING))
    listed = ", ".join(f"{kind} {ms:.1f}" for kind, ms in added.items())
    return [
        f"{name}: its sparse products take {sparse:.2f} times their floor at the data sheet's peak, which the card's "
        f"power does not allow; the same layers' products in dense bf16 take {dense:.2f} times theirs",
        f"{name}: the passes that fp8 adds take {sum(added.values()):.1f} ms ({listed}); the largest piece that could "
        "be avoided is to read tokens again for their largest magnitude, to round and to sample them "
        f"({tokens:.1f} ms), by kernels that do so where they write these tensors",
    ]


def _most(rows: dict[str, dict[str, float]], kind: str) -> float:
    return max(row.get(kind, 0.0) for row in rows.values())


def _shape(result: Result) -> str:
    return " x ".join(map(str, result["mkn"]))
