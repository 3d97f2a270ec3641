"""A whole training step, dense against semi-sparse, with the limit that this run's own products set."""

import time
from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.models import CARDS, Card, sparsified
from benchmarks.timing import interleaved, peak_memory
from semisparse import SwapReport, ops
from semisparse.gemm.tuner import tuner
from semisparse.surgery.layers import semi_sparse_layers


def benchmark(name: str, rounds: int) -> dict[str, Any]:
    """Time a step of the named card dense and sparse, interleaved; returns times, ratio, limit, memory, the layers."""
    card = CARDS[name]
    dense = card.build()
    sparse, report = sparsified(card)
    calls, compile_seconds = {}, {}
    for kind, model in (("dense", dense), ("sparse", sparse)):
        call = card.step(card.compile(model), model)
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        compile_seconds[kind] = time.perf_counter() - start
        calls[kind] = call
    memory = {kind: peak_memory(call) for kind, call in calls.items()}
    times = interleaved(calls, rounds=rounds)
    layers = {repr(layer) for layer in semi_sparse_layers(sparse).values()}
    saved = _saved_ms(report, card, next(sparse.parameters()).dtype)
    ratio = times["dense"].median_ms / times["sparse"].median_ms
    return {
        "card": name,
        "title": card.title,
        "note": card.note,
        "times_ms": {kind: timing.as_dict() for kind, timing in times.items()},
        "ratio_to_dense": ratio,
        "limit": times["dense"].median_ms / (times["dense"].median_ms - sum(saved.values())),
        "saved_by_products_ms": saved,
        "peak_memory_bytes": memory,
        "compile_seconds": compile_seconds,
        "layers": sorted(layers),
        "tuning": tuner().state(),
        "swapped": len(report.swapped),
        "skipped": report.skipped,
    }


def _saved_ms(report: SwapReport, card: Card, dtype: torch.dtype) -> dict[str, float]:
    """Milliseconds a step that the sparse products of all swapped layers save, by N x K; packing not counted."""
    shapes = Counter((row.out_features, row.in_features) for row in report if row.status == "swapped")
    saved = {}
    for (out_features, in_features), count in shapes.items():
        weight = torch.randn(out_features, in_features, device="cuda", dtype=dtype)
        x = torch.randn(card.tokens, in_features, device="cuda", dtype=dtype)
        grad_output = torch.randn(card.tokens, out_features, device="cuda", dtype=dtype)
        packed, packed_t = ops.pack(weight, dtype, "transposable")
        calls = {
            "dense forward": lambda x=x, w=weight: F.linear(x, w),
            "dense grad_input": lambda g=grad_output, w=weight: g @ w,
            "sparse forward": lambda x=x, p=packed, n=out_features: ops.packed_linear(x, p, None, n, "cusparselt"),
            "sparse grad_input": lambda g=grad_output, p=packed_t, k=in_features: ops.packed_linear(
                g, p, None, k, "cusparselt"
            ),
        }
        times = {name: timing.median_ms for name, timing in interleaved(calls, rounds=3, block_seconds=0.2).items()}
        gain = times["dense forward"] + times["dense grad_input"] - times["sparse forward"] - times["sparse grad_input"]
        saved[f"{out_features}x{in_features}"] = count * gain
    return saved
