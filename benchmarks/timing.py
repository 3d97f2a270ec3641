"""Timing on a power-limited GPU: variants interleaved in one process, each run back to back for a while.

A GPU that runs matrix products lowers its clock to stay under its power limit, so a short burst flatters the variant
that runs first. Every variant here gets the same number of blocks in turn; a block first warms up, then runs for at
least BLOCK_SECONDS. The figure of a variant is the median over its blocks of the mean time of one call. A ratio is the
median over the rounds of the quotient of the two blocks that ran in one round, so a slow drift of the clock cancels;
unless it is to dense of a fresh process (fresh.py), one figure for all rounds.
Python's garbage is collected before the first block; collections of all objects of the process do not fall into blocks.

Without a GPU everything runs on the CPU with the host's clock, so that the programs can be tried at toy size.
"""

import gc
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch

from semisparse.planning.timing import without_full_collections

BLOCK_SECONDS = 0.4
CPU_BLOCK_SECONDS = 0.01
WARM_SHARE = 0.25
ROUNDS = 5


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call.

    Attributes:
        median_ms: Median over the blocks of the mean time of one call.
        p20_ms: 20th percentile over the blocks.
        p80_ms: 80th percentile over the blocks.
        calls: How many calls were timed in all blocks together.
        blocks_ms: Mean time of one call in each block, in the order of the rounds.
    """

    median_ms: float
    p20_ms: float
    p80_ms: float
    calls: int
    blocks_ms: tuple[float, ...] = ()

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True)
class Spread:
    """Median, 20th and 80th percentile of one figure over the rounds."""

    median: float
    p20: float
    p80: float


def device() -> str:
    """Where the benchmarks run: "cuda" where there is one, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def synchronize() -> None:
    """Wait for the device."""
    if device() == "cuda":
        torch.cuda.synchronize()


@without_full_collections()
def interleaved(
    variants: Mapping[str, Callable[[], object]],
    *,
    rounds: int = ROUNDS,
    block_seconds: float | None = None,
    within: Mapping[str, Callable[[], AbstractContextManager[object]]] | None = None,
) -> dict[str, Timing]:
    """Time every variant in interleaved sustained blocks.

    Args:
        variants: Name -> a callable that enqueues one call.
        rounds: Blocks per variant.
        block_seconds: Least length of the timed part of a block, BLOCK_SECONDS if None; a quarter as long warms up.
            On a CPU, where nothing is measured, always CPU_BLOCK_SECONDS.
        within: Name -> a maker of the context that a block of this variant runs in; entered before the warm-up.

    Returns:
        Name -> times of one call.
    """
    within = within or {}
    seconds = (block_seconds or BLOCK_SECONDS) if device() == "cuda" else CPU_BLOCK_SECONDS
    counts = {}
    for name, call in variants.items():
        with within.get(name, nullcontext)():
            counts[name] = _calls_for(call, seconds)
    blocks: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, call in variants.items():
            with within.get(name, nullcontext)():
                _run(call, max(1, round(counts[name] * WARM_SHARE)))
                blocks[name].append(_run(call, counts[name]) / counts[name])
    return {name: _timing(values, counts[name] * rounds) for name, values in blocks.items()}


def ratio(dense: Timing, other: Timing, fresh: float | None = None) -> Spread:
    """How many times faster than dense the other variant is.

    Args:
        dense: Beside the variant; its blocks count round by round, unless there is a better figure.
        other: The variant.
        fresh: Milliseconds of dense in a fresh process (benchmarks/fresh.py), if they are known.
    """
    base = dense.blocks_ms if fresh is None else [fresh] * len(other.blocks_ms)
    return summary([one / two for one, two in zip(base, other.blocks_ms, strict=True)])


def summary(values: Sequence[float]) -> Spread:
    """Median, 20th and 80th percentile."""
    low, high = _percentiles(values)
    return Spread(statistics.median(values), low, high)


def captured(call: Callable[[], object]) -> Callable[[], object]:
    """The same call replayed from a CUDA graph, without the host; called three times before, which compiles and tunes.

    What the call returns is kept until its end only. Without a GPU: the call itself.
    """
    if device() != "cuda":
        return call
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def allocated() -> int:
    """Bytes that tensors hold on the GPU, garbage collected before; 0 without a GPU."""
    if device() != "cuda":
        return 0
    gc.collect()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


def peak_memory(call: Callable[[], object]) -> int:
    """Peak bytes that one call allocates beyond what is allocated before it; 0 without a GPU."""
    if device() != "cuda":
        return 0
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def kernels_of(events: Iterable[Any]) -> list[tuple[float, float, str]]:
    """Start and end in microseconds, and name, of each kernel of a profile.

    Args:
        events: What torch.profiler's events() gives.
    """
    return [
        (event.time_range.start, event.time_range.end, event.name)
        for event in events
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
    ]


def started(call: Callable[[], object], count: int) -> Callable[[], float]:
    """Enqueue `count` calls back to back; what gives their milliseconds once they are done."""
    if device() != "cuda":
        begin = time.perf_counter()
        for _ in range(count):
            call()
        took = 1000 * (time.perf_counter() - begin)
        return lambda: took
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(count):
        call()
    end.record()

    def wait() -> float:
        end.synchronize()
        return start.elapsed_time(end)

    return wait


def _run(call: Callable[[], object], count: int) -> float:
    """Milliseconds of `count` calls enqueued back to back."""
    return started(call, count)()


def _calls_for(call: Callable[[], object], seconds: float) -> int:
    """How many calls fill `seconds`; the calls made to find out also warm up compilation and tuning."""
    _run(call, 3)
    return max(3, round(seconds * 1000 / (_run(call, 3) / 3)) + 1)


def _timing(values: list[float], calls: int) -> Timing:
    low, high = _percentiles(values)
    return Timing(statistics.median(values), low, high, calls, tuple(values))


def _percentiles(values: Sequence[float]) -> tuple[float, float]:
    """The 20th and the 80th percentile."""
    cuts = statistics.quantiles(values, n=5, method="inclusive") if len(values) > 1 else list(values) * 4
    return cuts[0], cuts[-1]
