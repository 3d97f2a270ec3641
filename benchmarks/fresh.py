"""Dense calls in a fresh process: one that has not run a sparse product yet.

From its first sparse product until it ends, the power limit leaves dense products of a process a lower clock
(benchmarks/power.py; docs/speed.md). Beside 2:4, dense is therefore slower than without, and ratios to it are too high.
"""

from collections.abc import Callable, Mapping

from benchmarks.timing import device, interleaved
from semisparse import native
from semisparse.gemm.engine import engine
from semisparse.planning.timing import step_times

Call = Callable[[], object]


def ran_sparse() -> bool:
    """Whether this process has run a sparse product, for tuning, too; no CPU has."""
    return device() == "cuda" and (engine().multiplied or native.started() > 0)


def fresh_ms(calls: Mapping[str, Call]) -> dict[str, float]:
    """Milliseconds of dense calls, each run until the GPU is warm and steady, and then for some seconds more.

    Args:
        calls: Name -> what enqueues one call.

    Returns:
        By name; empty in a process that has run a sparse product.
    """
    if ran_sparse():
        print("dense is only timed beside 2:4: this process has run a sparse product before (benchmarks/runs/fresh.sh)")
        return {}
    if device() != "cuda":
        return {name: timing.median_ms for name, timing in interleaved(calls).items()}
    return {name: step_times(call).ms for name, call in calls.items()}
