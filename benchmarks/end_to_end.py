"""A whole training step: dense, 2:4 that packs at each forward, and 2:4 that packs once per step.

The three variants are three models, each compiled once, in the same interleaved blocks. Packing per step is part of
the step that is timed: it follows the optimizer step, as a training loop has it. A step without an optimizer packs
after its backward.
"""

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from torch import nn

from benchmarks.fresh import fresh_ms
from benchmarks.launches import launches
from benchmarks.models import CARDS, Card, sparsified
from benchmarks.timing import device, interleaved, peak_memory, ratio, synchronize
from semisparse import PackedWeights, Phase, SparseSchedule, tuning
from semisparse.surgery.layers import semi_sparse_layers

PER_STEP = "per step"
LONG = 10**9
"""Steps of the schedule's only phase: it does not end."""


def benchmark(name: str, rounds: int, toy: bool = False) -> dict[str, Any]:
    """Time a step of the named card in all variants, interleaved; dense before them, too, in the fresh process.

    Args:
        name: A key of CARDS.
        rounds: Interleaved blocks per variant.
        toy: Run at toy size, on any device; the figures mean nothing.

    Returns:
        Times, both ratios with their spread (to the fresh process's dense step where that is known), memory, who
        launches, and which layers were swapped and skipped.

    Raises:
        RuntimeError: On a GPU, if layers that should pack per step do not.
    """
    card = CARDS[name]
    sparse, report = sparsified(card, toy)
    models = {"dense": card.build(toy), "sparse": sparse, PER_STEP: sparsified(card, toy)[0]}
    calls: dict[str, Callable[[], object]] = {}
    compile_seconds = {}
    fresh: dict[str, float] = {}
    for kind, model in models.items():
        step = card.step(card.compile(model), model, toy)
        calls[kind] = packing_after(step, model, card) if kind == PER_STEP else step
        compile_seconds[kind] = seconds(calls[kind])
        if kind == "dense":
            fresh = fresh_ms({kind: calls[kind]})
    memory = {kind: peak_memory(call) for kind, call in calls.items()}
    times = interleaved(calls, rounds=rounds)
    ratios = {kind: ratio(times["dense"], times[kind], fresh.get("dense")) for kind in ("sparse", PER_STEP)}
    return {
        "card": name,
        "label": card.label,
        "title": card.title,
        "note": card.note,
        "times_ms": {kind: timing.as_dict() for kind, timing in times.items()},
        "fresh_ms": fresh,
        "ratio_to_dense": ratios["sparse"].median,
        "ratio_spread": asdict(ratios["sparse"]),
        "per_step": {"ratio_to_dense": ratios[PER_STEP].median, "ratio_spread": asdict(ratios[PER_STEP])},
        "peak_memory_bytes": memory,
        "compile_seconds": compile_seconds,
        "launches": launches(),
        "layers": sorted({repr(layer) for layer in semi_sparse_layers(sparse).values()}),
        "tuning": tuning.state(),
        "swapped": len(report.swapped),
        "skipped": report.skipped,
    }


def packing_after(step: Callable[[], object], model: nn.Module, card: Card) -> Callable[[], object]:
    """The step, then the packing of its weights.

    Raises:
        RuntimeError: On a GPU, if layers that should pack per step do not.
    """
    if card.optimizes:
        schedule = SparseSchedule(model, [Phase("sparse", LONG)], pack="per_step")
        schedule.trust_calls()  # packs per step from the first one
        packed, pack = schedule.packed_weights, schedule.step
    else:
        packed = PackedWeights(model)
        pack = packed.pack
        pack()
    assert packed is not None
    if device() == "cuda" and packed.layers < (count := len(semi_sparse_layers(model))):
        raise RuntimeError(f"only {packed.layers} of {count} layers pack per step: {packed.fallbacks}")

    def whole() -> None:
        step()
        pack()

    return whole


def seconds(call: Callable[[], object]) -> float:
    """Seconds of one call until the device is done, such as the first, which compiles."""
    start = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - start
