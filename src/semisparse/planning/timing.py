"""How a plan times calls on a power-limited GPU: all candidates of one problem interleaved, each sustained for a while.

A GPU that runs matrix products lowers its clock to stay under its power limit, so a short burst flatters what runs
first. Every call gets blocks in turn; a block warms up, then runs for BLOCK_SECONDS. The time of a call is the median
over its blocks. Host time is what the calling thread spends until a call is enqueued, with the device idle before.

Whole steps, which the host may bound, get more and longer blocks: a host that others use is slower for a second at a
time (blocks_ms of the eager models in benchmarks/results/plan-*.json).
"""

import gc
import logging
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch

logger = logging.getLogger(__name__)

Mode = Literal["eager", "graph", "compiled"]
"""How the user trains: eager, replayed from a CUDA graph, or compiled."""

Call = Callable[[], object]

BLOCK_SECONDS, ROUNDS = 0.06, 5
STEP_BLOCK_SECONDS, STEP_ROUNDS = 0.25, 16
WARM_SHARE = 0.25
_STEADY_BLOCK_SECONDS, _STEADY_SECONDS, _STEADY_SHARE = 0.5, (3.0, 8.0), 0.003
_HOST_CALLS = 10
"""Launches of so few calls fit into the queue of a stream (about 1000), so that the host does not wait for the GPU."""


@dataclass(frozen=True, slots=True)
class Times:
    """Milliseconds of one call.

    Attributes:
        ms: As the mode runs it, back to back: the device's time or the host's, whichever is longer.
        device_ms: Of the device alone, replayed from a CUDA graph; None if the call cannot be captured.
        host_ms: Of the host alone; None in mode "graph", where it has none.
        held_bytes: What the forward leaves allocated for the backward, the result included.
    """

    ms: float
    device_ms: float | None = None
    host_ms: float | None = None
    held_bytes: int = 0

    @property
    def on_device(self) -> float:
        """device_ms, or ms where that is not known."""
        return self.ms if self.device_ms is None else self.device_ms

    @property
    def on_host(self) -> float:
        """host_ms, or ms where that is not known."""
        return self.ms if self.host_ms is None else self.host_ms


def plus(one: Times, other: Times, factor: float = 1.0) -> Times:
    """one + factor * other, field by field; a field that either lacks is None."""

    def both(first: float | None, second: float | None) -> float | None:
        return None if first is None or second is None else first + factor * second

    return Times(
        one.ms + factor * other.ms,
        both(one.device_ms, other.device_ms),
        both(one.host_ms, other.host_ms),
        round(one.held_bytes + factor * other.held_bytes),
    )


@contextmanager
def without_full_collections() -> Iterator[None]:
    """Collect garbage now, and what is old by then not again before the end.

    A full collection walks every object of the process, millions with a few libraries loaded, and falls into one block
    in many. Young objects, and so the cycles that steps leave, are collected as ever. Restores what was set before.
    """
    gc.collect()
    young, middle, old = gc.get_threshold()
    gc.set_threshold(young, middle, 1_000_000)
    try:
        yield
    finally:
        gc.set_threshold(young, middle, old)


@without_full_collections()
def cuda_times(calls: Mapping[str, Call], mode: Mode) -> dict[str, Times]:
    """Time calls on the current GPU, interleaved.

    Args:
        calls: Name -> what enqueues one call.
        mode: How they are run. "graph" leaves out those that cannot be captured.

    Raises:
        Exception: What a call raises.
    """
    graphs = {}
    for name, call in calls.items():
        try:
            graphs[name] = _captured(call)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            logger.info("%s cannot be captured in a CUDA graph: %s", name, error)
    if mode == "graph":
        return {name: Times(ms, ms) for name, ms in interleaved(graphs).items()}
    # All names have a prefix, so that no candidate's is that of the graph of another.
    as_called = {f"call: {name}": call for name, call in calls.items()}
    ms = interleaved(as_called | {f"graph: {name}": graph for name, graph in graphs.items()})
    return {name: Times(ms[f"call: {name}"], ms.get(f"graph: {name}"), host_ms(call)) for name, call in calls.items()}


@without_full_collections()
def step_times(step: Call) -> Times:
    """Time a whole training step as the user runs it.

    Host time is that of one step with the device idle before. Where a step waits for the device, or launches more than
    the queue of a stream holds, it includes the waiting: it may be too long, and is given as no longer than the step.

    Args:
        step: Enqueues one step; it is run some ten to a hundred times.
    """
    for _ in range(3):
        step()
    _until_steady(step)
    ms = interleaved({"": step}, STEP_BLOCK_SECONDS, STEP_ROUNDS)[""]
    return Times(ms, None, min(ms, host_ms(step, calls=1)))


def host_ms(call: Call, calls: int = _HOST_CALLS) -> float:
    """Milliseconds until one call is enqueued: the median over five bursts.

    Args:
        call: Enqueues work.
        calls: Per burst.
    """
    bursts = []
    for _ in range(5):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        bursts.append(1000 * (time.perf_counter() - begin) / calls)
    torch.cuda.synchronize()
    return statistics.median(bursts)


def _captured(call: Call) -> Call:
    """The call replayed from a CUDA graph; called three times before, which compiles and tunes."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def calls_per_block(call: Call, block_seconds: float = BLOCK_SECONDS) -> int:
    """How many calls fill a block; runs a few.

    Args:
        call: Enqueues work.
        block_seconds: Of a block.
    """
    _run(call, 3)
    return max(3, round(1000 * block_seconds / max(_run(call, 3) / 3, 1e-3)) + 1)


def block_ms(call: Call, count: int) -> float:
    """Milliseconds of one call in a block that has warmed up.

    Args:
        call: Enqueues work.
        count: Calls in the block.
    """
    _run(call, max(1, round(count * WARM_SHARE)))
    return _run(call, count) / count


def interleaved(
    calls: Mapping[str, Call], block_seconds: float = BLOCK_SECONDS, rounds: int = ROUNDS
) -> dict[str, float]:
    """Milliseconds of one call each on the current GPU, the median over blocks that take turns.

    Args:
        calls: Name -> what enqueues one call.
        block_seconds: That each block is sustained for.
        rounds: Blocks per call.
    """
    counts = {name: calls_per_block(call, block_seconds) for name, call in calls.items()}
    blocks: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            blocks[name].append(block_ms(call, counts[name]))
    return {name: statistics.median(values) for name, values in blocks.items()}


def _until_steady(step: Call) -> None:
    """Run steps until half a second of them takes as long as the half before: a cold GPU clocks higher.

    A compiled Llama-style step took 131 ms on an H100 right after compiling, and 139 ms in the long run that followed.
    """
    least, most = _STEADY_SECONDS
    count, spent, before = calls_per_block(step, _STEADY_BLOCK_SECONDS), 0.0, 0.0
    while spent < 1000 * most:
        taken = _run(step, count)
        spent += taken
        if spent > 1000 * least and abs(taken - before) < _STEADY_SHARE * taken:
            return
        before = taken


def _run(call: Call, count: int) -> float:
    """Milliseconds of `count` calls enqueued back to back."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(count):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)
