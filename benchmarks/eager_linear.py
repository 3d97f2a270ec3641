"""One eager linear layer, forward and backward: dense, packing at each forward, and packing per step, counted."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from benchmarks.fresh import fresh_ms
from benchmarks.launches import launches
from benchmarks.linear import inputs, step
from benchmarks.timing import device, interleaved, ratio
from semisparse import PackedWeights, SemiSparseLinear, tuning

SHAPES = ((13008, 1024, 4096), (13008, 4096, 1024))
"""M x K x N of ViT-L's MLP."""

EACH, PER_STEP = "each forward", "per step"


def benchmark(tokens: int, in_features: int, out_features: int, rounds: int) -> dict[str, Any]:
    """Times and ratios to dense of one shape; bf16 with bias."""
    x, grad_output = inputs(tokens, in_features, out_features)
    kinds = {"dense": torch.nn.Linear, EACH: SemiSparseLinear, PER_STEP: SemiSparseLinear}
    calls: dict[str, Callable[[], object]] = {}
    fresh: dict[str, float] = {}
    for name, kind in kinds.items():
        layer = kind(in_features, out_features, device=device(), dtype=torch.bfloat16)
        calls[name] = step(layer, x, grad_output)
        if name == PER_STEP:
            calls[name] = packing_first(PackedWeights(layer), calls[name])
        calls[name]()
        if name == "dense":
            fresh = fresh_ms({name: calls[name]})
    times = interleaved(calls, rounds=rounds)
    ratios = {name: ratio(times["dense"], times[name], fresh.get("dense")) for name in (EACH, PER_STEP)}
    return {
        "mkn": [tokens, in_features, out_features],
        "times_ms": {name: timing.as_dict() for name, timing in times.items()},
        "fresh_ms": fresh,
        "ratio_to_dense": {name: one.median for name, one in ratios.items()},
        "ratio_spread": {name: asdict(one) for name, one in ratios.items()},
        "launches": launches(),
        "tuning": tuning.state(),
    }


def packing_first(packed: PackedWeights, call: Callable[[], object]) -> Callable[[], object]:
    """The packing of a layer's weight, then the call.

    Raises:
        RuntimeError: On a GPU, if the layer does not pack per step.
    """
    if packed.pack() < 1 and device() == "cuda":
        raise RuntimeError(f"the layer does not pack per step: {packed.fallbacks}")

    def whole() -> None:
        packed.pack()
        call()

    return whole
