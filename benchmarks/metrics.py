"""What following the masks costs beside a training step: MaskMetrics at its default interval."""

from collections.abc import Callable
from typing import Any

from benchmarks.models import CARDS, sparsified
from benchmarks.timing import interleaved, peak_memory, synchronize
from semisparse import MaskMetrics
from semisparse.metrics import DEFAULT_INTERVAL


def benchmark(card_name: str, rounds: int, toy: bool = False) -> dict[str, Any]:
    """Milliseconds of one step and of all that MaskMetrics adds in an interval of steps; the share is their quotient.

    The added part is timed back to back on its own: the two mask computations and the statistics of one measured step,
    and the host's counting of the others. It counts as if nothing of it could run beside the training step.
    """
    card = CARDS[card_name]
    model, report = sparsified(card, toy)
    step = card.step(card.compile(model), model, toy)
    followed = MaskMetrics(model)

    def interval() -> None:
        for _ in range(DEFAULT_INTERVAL):
            followed.update()

    calls: dict[str, Callable[[], object]] = {"step": step, "metrics of an interval": interval}
    for call in calls.values():
        call()
    memory = peak_memory(interval)
    times = interleaved(calls, rounds=rounds)
    followed.read()
    synchronize()
    share = times["metrics of an interval"].median_ms / (DEFAULT_INTERVAL * times["step"].median_ms)
    return {
        "card": card_name,
        "label": card.label,
        "title": card.title,
        "interval": DEFAULT_INTERVAL,
        "layers": len(report.swapped),
        "times_ms": {name: timing.as_dict() for name, timing in times.items()},
        "share_of_step": share,
        "peak_memory_bytes": memory,
    }
