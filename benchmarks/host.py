"""Host time of small layers: what a call costs before the GPU has anything to do.

A stack of small layers in bf16, of nn.Linear, of 2:4 layers that pack at each forward, and of 2:4 layers that pack once
per iteration (PackedWeights.pack, counted). The layers have no bias, unless the mode says so. Products are so small
that the GPU waits for the host.

Host time is what a few iterations take to issue; the device is waited for between measurements, outside of them. All
variants run in one process, in turn, in many rounds. A ratio is the median over the rounds of the quotient of the two
times of one round, because other programs share the host and disturb single rounds.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from benchmarks.launches import launches, started_natively
from benchmarks.timing import Spread, device, summary, synchronize
from semisparse import PackedWeights, SemiSparseLinear

LAYERS, FEATURES, TOKENS = 24, 256, 64
ROUNDS = 31
ITERATIONS = 20
"""Of one measurement. More would fill the queue of launches, so that the host waits for the GPU."""

DENSE, EACH, PER_STEP, PACKED = "nn.Linear", "each forward", "per step", "per step, pack not counted"
PASSES = FORWARD, BOTH = "forward", "forward + backward"
MODES: dict[str, dict[str, bool]] = {"eager": {}, "eager, with bias": {"bias": True}, "compiled": {"compiled": True}}
"""Mode -> arguments of variants."""

Call = Callable[[], object]


def benchmark(rounds: int = ROUNDS, toy: bool = False) -> dict[str, Any]:
    """Microseconds of host time per layer of every variant, eager and compiled, and ratios to nn.Linear.

    Args:
        rounds: Interleaved rounds.
        toy: Two layers, a few iterations.

    Returns:
        For each of MODES, each pass and each variant: median, p20 and p80, ratio, and how many products with a packed
        operand the native library started in one iteration, sparse and masked dense.
    """
    layers, iterations = (2, 2) if toy else (LAYERS, ITERATIONS)
    calls = {
        (mode, *key): call for mode, arguments in MODES.items() for key, call in variants(layers, **arguments).items()
    }
    started = {key: started_natively(call) for key, call in calls.items()}
    times = rounds_of(calls, rounds=rounds, iterations=iterations)
    modes: dict[str, Any] = {}
    for (mode, passes, kind), values in times.items():
        dense = times[mode, passes, DENSE]
        modes.setdefault(mode, {}).setdefault(passes, {})[kind] = {
            **asdict(summary([value / layers for value in values])),
            "ratio": asdict(relative(values, dense)),
            "native_products": started[mode, passes, kind][0],
            "native_dense_products": started[mode, passes, kind][1],
        }
    return {
        "stack": {"layers": layers, "in_features": FEATURES, "out_features": FEATURES, "tokens": TOKENS},
        "rounds": rounds,
        "iterations": iterations,
        "us_per_layer": modes,
        "launches": launches(),
        "threads": torch.get_num_threads(),
    }


def variants(layers: int = LAYERS, *, compiled: bool = False, bias: bool = False) -> dict[tuple[str, str], Call]:
    """(pass, variant) -> one iteration of the stack; called three times already, which compiles and prepares."""
    torch.manual_seed(0)
    x = torch.randn(TOKENS, FEATURES, device=device(), dtype=torch.bfloat16, requires_grad=True)
    found: dict[tuple[str, str], Call] = {}
    for kind in (DENSE, EACH, PER_STEP):
        model = _stack(layers, sparse=kind != DENSE, bias=bias)
        called = torch.compile(model) if compiled else model
        pack = PackedWeights(model).pack if kind == PER_STEP else None
        if pack is not None and pack() < layers and device() == "cuda":
            raise RuntimeError("layers that should pack per step pack at each forward")
        found |= _passes(kind, model, called, x, pack)
    for call in found.values():
        for _ in range(3):
            call()
    synchronize()
    return found


def rounds_of(calls: Mapping[Any, Call], *, rounds: int, iterations: int) -> dict[Any, list[float]]:
    """Microseconds of host time of one iteration of each call, one value per round, interleaved.

    Every second round goes backwards, so that no variant always follows the same one.
    """
    times: dict[Any, list[float]] = {name: [] for name in calls}
    for turn in range(rounds):
        for name in list(calls)[:: -1 if turn % 2 else 1]:
            times[name].append(_issued(calls[name], iterations))
    return times


def relative(values: list[float], dense: list[float]) -> Spread:
    """values over dense, round by round."""
    return summary([one / two for one, two in zip(values, dense, strict=True)])


def _stack(layers: int, *, sparse: bool, bias: bool) -> nn.Module:
    kind = SemiSparseLinear if sparse else nn.Linear
    where: dict[str, Any] = {"device": device(), "dtype": torch.bfloat16}
    return nn.Sequential(*[kind(FEATURES, FEATURES, bias=bias, **where) for _ in range(layers)])


def _passes(
    kind: str, model: nn.Module, called: nn.Module, x: torch.Tensor, pack: Call | None
) -> dict[tuple[str, str], Call]:
    """The forward, with gradients recorded, and forward and backward. With pack, the forward also without it."""

    def bare() -> None:
        called(x)

    def forward() -> None:
        if pack is not None:
            pack()
        called(x)

    def both() -> None:
        if pack is not None:
            pack()
        model.zero_grad()
        x.grad = None
        called(x).sum().backward()

    found: dict[tuple[str, str], Call] = {(FORWARD, kind): bare if pack is None else forward, (BOTH, kind): both}
    return found if pack is None else {**found, (FORWARD, PACKED): bare}


def _issued(call: Call, iterations: int) -> float:
    """Microseconds of host time of one call, among iterations of them; waits for the device before and after."""
    synchronize()
    begin = time.perf_counter()
    for _ in range(iterations):
        call()
    spent = time.perf_counter() - begin
    synchronize()
    return spent / iterations * 1e6
