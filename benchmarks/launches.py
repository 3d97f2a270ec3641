"""Who launches the kernels of a run: the native library, or Python."""

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.timing import synchronize
from semisparse import native

Result = dict[str, Any]


def launches() -> dict[str, Any]:
    """Whether the native library launches in this process, and the reason if it does not."""
    status = native.status()
    return {"native": status.loaded, "reason": status.reason}


def started_natively(call: Callable[[], object]) -> tuple[int, int]:
    """Products with a packed operand that the native library starts in one call: sparse ones, and masked-dense ones."""
    sparse, dense = native.started(), native.started_dense()
    call()
    synchronize()
    return native.started() - sparse, native.started_dense() - dense


def launch_note(results: Sequence[Result]) -> str:
    """Who launched in these results, as sentences; nothing for results that do not say."""
    found = [result["launches"] for result in results if "launches" in result]
    lines = ["The native library launched the kernels."] if any(one["native"] for one in found) else []
    lines += [
        f"Python launched the kernels: {reason}." for reason in {one["reason"]: 0 for one in found if not one["native"]}
    ]
    return " ".join(lines)
