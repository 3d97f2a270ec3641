"""Timing on a power-limited GPU: variants interleaved in one process, each run back to back for a while.

A GPU that runs matrix products lowers its clock to stay under its power limit, so a short burst flatters whatever runs
first. Every variant here gets the same number of blocks in turn; a block first warms up, then runs for at least
BLOCK_SECONDS; the figure of a variant is the median over its blocks of the mean time of one call.
"""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import torch

BLOCK_SECONDS = 0.4
WARM_SECONDS = 0.1
ROUNDS = 5


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: median, 20th and 80th percentile over the blocks, and how many calls were timed."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    calls: int

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def interleaved(
    variants: Mapping[str, Callable[[], object]],
    *,
    rounds: int = ROUNDS,
    block_seconds: float = BLOCK_SECONDS,
    warm_seconds: float = WARM_SECONDS,
) -> dict[str, Timing]:
    """Time every variant (a callable that enqueues one call) in `rounds` interleaved sustained blocks."""
    counts = {name: _calls_for(call, block_seconds) for name, call in variants.items()}
    blocks: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, call in variants.items():
            _run(call, max(1, round(counts[name] * warm_seconds / block_seconds)))
            blocks[name].append(_run(call, counts[name]) / counts[name])
    return {name: _timing(values, counts[name] * rounds) for name, values in blocks.items()}


def captured(call: Callable[[], object]) -> Callable[[], None]:
    """The same call replayed from a CUDA graph, without the host; called three times before, which compiles and tunes.

    What the call returns is kept until its end only.
    """
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


def peak_memory(call: Callable[[], object]) -> int:
    """Peak bytes that one call allocates beyond what is allocated before it."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _run(call: Callable[[], object], count: int) -> float:
    """Milliseconds of `count` calls enqueued back to back."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(count):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _calls_for(call: Callable[[], object], seconds: float) -> int:
    """How many calls fill `seconds`; the calls made to find out also warm up compilation and tuning."""
    _run(call, 3)
    return max(3, round(seconds * 1000 / (_run(call, 3) / 3)) + 1)


def _timing(values: list[float], calls: int) -> Timing:
    cuts = statistics.quantiles(values, n=5, method="inclusive") if len(values) > 1 else values * 4
    return Timing(statistics.median(values), cuts[0], cuts[-1], calls)
