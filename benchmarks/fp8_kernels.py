"""The passes of fp8 over tensors, against copies that move as many bytes, with nothing in the L2 cache.

Each op is a pass for the largest magnitude and then one that writes; the first is timed alone, too, and taken off. As
in pack.py a variant is one CUDA graph of calls over many tensors, so that every call reads and writes DRAM.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.pack import FOOTPRINT
from benchmarks.timing import captured, device, interleaved
from semisparse import ops

SHAPES = ((11008, 4096), (16384, 4096), (16384, 11008))
"""Rows and columns: a weight's, and those of tokens."""
TOY_SHAPES = ((64, 64),)

PACKED = 1 / 2 + 1 / 8
"""Bytes of a packed e4m3 matrix over its entries."""
LARGEST = "largest magnitude"
PASSES: dict[str, tuple[Callable[[Tensor], object], float]] = {
    "prune, round and pack both ways": (lambda x: ops.pack_fp8(x, "transposable", None), 2 + 2 * PACKED),
    "round to both layouts": (lambda x: ops.quantise(x, True, True), 2 + 2),
    "round to rows": (lambda x: ops.quantise(x, True, False), 2 + 1),
    "round, sample and pack, sum": (lambda x: ops.sample_fp8(x, None, True, x.dtype), 2 + 1 + PACKED),
}
"""Each op, and the bytes per entry that its second pass moves (bf16)."""


def benchmark(rows: int, columns: int, rounds: int) -> dict[str, Any]:
    """Microseconds of each pass at one size, and its share of a copy's rate.

    Args:
        rows: Of the bf16 matrix.
        columns: Likewise.
        rounds: Interleaved blocks per variant.
    """
    torch.manual_seed(0)
    size = 2 * rows * columns
    count = max(4, (FOOTPRINT if device() == "cuda" else 0) // size)
    inputs = [torch.randn(rows, columns, device=device(), dtype=torch.bfloat16) for _ in range(count)]
    calls = {name: call for name, (call, _) in PASSES.items()} | {LARGEST: lambda x: ops.quantise(x, False, False)}
    # A list holds the results of one graph apart until the last of them is there.
    graphs = {name: captured(lambda call=call: [call(x) for x in inputs]) for name, call in calls.items()}
    graphs["copy"] = captured(lambda: [x.clone() for x in inputs])
    times = {name: timing.median_ms * 1000 / count for name, timing in interleaved(graphs, rounds=rounds).items()}
    per_byte = times["copy"] / (2 * size)
    alone = {name: times[name] - times[LARGEST] for name in PASSES}
    rates = {name: moved * rows * columns * per_byte / alone[name] for name, (_, moved) in PASSES.items()}
    return {
        "mn": [rows, columns],
        "microseconds": times,
        "second_pass_microseconds": alone,
        "rate_of_copy": rates | {LARGEST: size * per_byte / times[LARGEST]},
    }
