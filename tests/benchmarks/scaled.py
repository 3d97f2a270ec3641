"""A made-up result of benchmarks.scaling whose figures are easy to compute with."""

from typing import Any

from benchmarks.scaling import COMPRESSED, variants
from benchmarks.store import provenance

LAYERS = 10
WHOLE = 8e9
"""Bytes of all weights, and of all gradients."""
RATE = 1e8
"""Bytes per millisecond of collectives alone."""
COMPUTE = {"bf16": 300.0, "2:4": 240.0, "fp8 + 2:4": 150.0}
EXPOSED = 30.0


def result(ranks: int = 2) -> dict[str, Any]:
    """Of ranks GPUs."""
    block = WHOLE / LAYERS
    moved = block * (ranks - 1) / ranks / RATE
    made = []
    for precision, layout in variants(ranks):
        share = 1.0 if layout != COMPRESSED else 5 / 16 if "fp8" in precision else 9 / 16
        alone = layout == "one GPU"
        sent = {"allgather_base": 2 * WHOLE * share / ranks, "reduce_scatter_base": WHOLE}
        time = COMPUTE[precision] + (0 if alone else EXPOSED)
        made.append({
            "precision": precision, "layout": layout, "losses": [10.0, 9.0], "median_ms": time,
            "tokens_per_second_and_gpu": 16384e3 / time, "peak_bytes": int(6e10),
            "bytes_per_step": {} if alone else {"allreduce": WHOLE} if layout == "DDP" else sent,
            "collectives_ms": 0.0 if alone else 90.0, "exposed_ms": 0.0 if alone else EXPOSED,
        })  # fmt: skip
    return {
        "provenance": provenance(),
        "kind": "scaling",
        "file": f"scaling-{ranks}.json",
        "ranks": ranks,
        "nccl": {"NCCL_NVLS_ENABLE": "0"},
        "model": {"width": 4096, "hidden": 11008, "depth": LAYERS, "batch": 8},
        "tokens_per_rank": 16384,
        "compiled": True,
        "collectives_ms": {
            "all-gather": {str(int(block)): moved, str(int(block * 9 / 16)): moved * 9 / 16, "1": 1.0},
            "reduce-scatter": {str(int(block)): moved},
            "all-reduce": {str(int(block)): 2 * moved},
        },
        "variants": made,
        "again_ms": 300.0,
    }
