"""A whole training step, dense against semi-sparse, and the same step with its weights packed beforehand.

The last is the limit: what 2:4 would gain if pruning and packing cost nothing. It is measured in the same interleaved
blocks, with the layers inside `semisparse.reuse_packed`. Eager steps have no limit, since there a layer notices that
the optimizer changed its weight and packs again.
"""

import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F

import semisparse
from benchmarks.models import CARDS, Card, sparsified
from benchmarks.timing import device, interleaved, peak_memory, ratio, synchronize
from semisparse import SwapReport, ops, tuning
from semisparse.surgery.layers import semi_sparse_layers

PACKED_BEFORE = "packed beforehand"


def benchmark(name: str, rounds: int, toy: bool = False) -> dict[str, Any]:
    """Time a step of the named card dense and sparse, interleaved.

    Args:
        name: A key of CARDS.
        rounds: Interleaved blocks per variant.
        toy: Run at toy size, on any device; the figures mean nothing.

    Returns:
        Times, ratio with its spread, limit, memory, and which layers were swapped and skipped.
    """
    card = CARDS[name]
    dense = card.build(toy)
    sparse, report = sparsified(card, toy)
    calls: dict[str, Callable[[], object]] = {}
    compile_seconds = {}
    for kind, model in (("dense", dense), ("sparse", sparse)):
        calls[kind] = card.step(card.compile(model), model, toy)
        compile_seconds[kind] = _seconds(calls[kind])
    memory = {kind: peak_memory(call) for kind, call in calls.items()}
    within: dict[str, Callable[[], AbstractContextManager[object]]] = {}
    errors = {}
    if card.compiled:
        within[PACKED_BEFORE] = lambda: semisparse.reuse_packed(sparse)
        try:
            with within[PACKED_BEFORE]():
                compile_seconds[PACKED_BEFORE] = _seconds(calls["sparse"])
            calls[PACKED_BEFORE] = calls["sparse"]
        except Exception as error:  # without the limit the step itself can still be measured
            errors[PACKED_BEFORE] = f"{type(error).__name__}: {error}"
    times = interleaved(calls, rounds=rounds, within=within)
    ratios = {kind: ratio(times["dense"], times[kind]) for kind in calls if kind != "dense"}
    limit = ratios.get(PACKED_BEFORE)
    return {
        "card": name,
        "label": card.label,
        "title": card.title,
        "note": card.note,
        "times_ms": {kind: timing.as_dict() for kind, timing in times.items()},
        "ratio_to_dense": ratios["sparse"].median,
        "ratio_spread": asdict(ratios["sparse"]),
        "limit": None if limit is None else limit.median,
        "limit_spread": None if limit is None else asdict(limit),
        "limit_method": "measured",
        "saved_by_products_ms": _saved_ms(report, card, next(sparse.parameters()).dtype, toy) if card.compiled else {},
        "peak_memory_bytes": memory,
        "compile_seconds": compile_seconds,
        "layers": sorted({repr(layer) for layer in semi_sparse_layers(sparse).values()}),
        "tuning": tuning.state(),
        "swapped": len(report.swapped),
        "skipped": report.skipped,
        "errors": errors,
    }


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - start


def _saved_ms(report: SwapReport, card: Card, dtype: torch.dtype, toy: bool) -> dict[str, float]:
    """Milliseconds a step that the sparse products of all swapped layers save, by N x K; packing not counted."""
    shapes = Counter((row.out_features, row.in_features) for row in report if row.status == "swapped")
    tokens = 32 if toy else card.tokens
    saved = {}
    for (out_features, in_features), count in shapes.items():
        weight = torch.randn(out_features, in_features, device=device(), dtype=dtype)
        x = torch.randn(tokens, in_features, device=device(), dtype=dtype)
        grad_output = torch.randn(tokens, out_features, device=device(), dtype=dtype)
        packed, packed_t = ops.pack(weight, dtype, "transposable")
        calls = {
            "dense forward": lambda x=x, w=weight: F.linear(x, w),
            "dense grad_input": lambda g=grad_output, w=weight: g @ w,
            "sparse forward": lambda x=x, p=packed, n=out_features: ops.packed_matmul(x, p, None, n, "cusparselt"),
            "sparse grad_input": lambda g=grad_output, p=packed_t, k=in_features: ops.packed_matmul(
                g, p, None, k, "cusparselt"
            ),
        }
        times = {name: timing.median_ms for name, timing in interleaved(calls, rounds=3, block_seconds=0.2).items()}
        gain = times["dense forward"] + times["dense grad_input"] - times["sparse forward"] - times["sparse grad_input"]
        saved[f"{out_features}x{in_features}"] = count * gain
    return saved
