"""Exposed communication: the time of a step in which a GPU runs kernels of collectives and nothing else."""

from collections.abc import Callable, Iterable
from typing import Any

import torch

from benchmarks.timing import device, kernels_of, synchronize

Span = tuple[float, float]
"""Begin and end of a kernel, in one unit of time."""


def union(spans: Iterable[Span]) -> list[Span]:
    """The same times as spans that do not overlap, in order."""
    merged: list[Span] = []
    for begin, end in sorted(spans):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((begin, end))
    return merged


def length(spans: Iterable[Span]) -> float:
    """The time that spans cover together."""
    return sum(end - begin for begin, end in union(spans))


def exposed(collectives: list[Span], others: list[Span]) -> float:
    """The time that collectives cover and no other kernel does."""
    return length([*collectives, *others]) - length(others)


def profiled(step: Callable[[], object], steps: int) -> dict[str, float]:
    """Milliseconds per step of this rank's GPU: collectives, their exposed part, other kernels; 0 without a GPU.

    Args:
        step: Called once before; every rank calls this at the same time.
        steps: How many steps are looked at.
    """
    collectives: list[Span] = []
    others: list[Span] = []
    if device() == "cuda":
        step()
        synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(steps):
                step()
            synchronize()
        collectives, others = spans_of(profile.events())
    unit = 1000 * steps  # microseconds of all steps
    return {
        "collectives_ms": length(collectives) / unit,
        "exposed_ms": exposed(collectives, others) / unit,
        "other_kernels_ms": length(others) / unit,
    }


def spans_of(events: Iterable[Any]) -> tuple[list[Span], list[Span]]:
    """Of NCCL's kernels and of the others.

    Args:
        events: Of a profile.
    """
    collectives: list[Span] = []
    others: list[Span] = []
    for begin, end, name in kernels_of(events):
        (collectives if name.startswith("nccl") else others).append((begin, end))
    return collectives, others
