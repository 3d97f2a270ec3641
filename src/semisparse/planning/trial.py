"""Trying choices in the whole training step, on the model itself: what the layers' times alone do not tell.

In a step that the host bounds, a layer costs the host more between the other work of a model than in a loop of its own.
So the best choices are swapped in, timed interleaved with the dense step, and taken out again.
"""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import nn

from semisparse.config import SparseConfig
from semisparse.errors import PlanError
from semisparse.planning.timing import (
    BLOCK_SECONDS,
    ROUNDS,
    Call,
    block_ms,
    calls_per_block,
    without_full_collections,
)
from semisparse.schedule import Phase, SparseSchedule
from semisparse.schedule.step_packing import Pack
from semisparse.surgery.densify import densify
from semisparse.surgery.layers import semi_sparse_layers
from semisparse.surgery.swap import sparsify

Configs = Mapping[str, SparseConfig]
Trial = Callable[[Sequence[Configs]], list[float]]
"""Milliseconds of a step with each of these settings by layer name; with none, of the dense step."""

_LONG = 2**40
"""Steps of a phase that does not end here."""
_STEP_BLOCK_SECONDS = 5 * BLOCK_SECONDS


def tried(model: nn.Module, step: Call, variants: Sequence[Configs], pack: Pack = "each_forward") -> list[float]:
    """Milliseconds of a training step with each variant swapped into model: medians, interleaved and sustained.

    The model is dense again afterwards, whatever happens; its weights are those that the steps have trained.

    Args:
        model: Dense.
        step: Enqueues one training step of model, eagerly, with its optimizer's.
        variants: Settings by layer name; an empty one is the dense model.
        pack: As SparseSchedule's.

    Raises:
        PlanError: step does not run the layers of model: it may replay a graph, or run a copy.
        Exception: What the swap or a step raises.
    """
    counts = []
    for configs in variants:
        with training(model, step, configs, pack) as call:
            if configs and not _runs(model, call):
                raise PlanError("step does not run the layers of model: it may replay a graph, or run a copy of model")
            counts.append(calls_per_block(call, _STEP_BLOCK_SECONDS))
    blocks: list[list[float]] = [[] for _ in variants]
    with without_full_collections():
        for _ in range(ROUNDS):
            for times, count, configs in zip(blocks, counts, variants, strict=True):
                with training(model, step, configs, pack) as call:
                    times.append(block_ms(call, count))
    return [statistics.median(times) for times in blocks]


@contextmanager
def training(model: nn.Module, step: Call, configs: Configs, pack: Pack) -> Iterator[Call]:
    """The step with layers of model made semi-sparse and with a schedule's; the model is dense again at the end.

    Args:
        model: Dense.
        step: As tried's.
        configs: Settings by layer name; may be empty.
        pack: As SparseSchedule's.
    """
    if not configs:
        yield step
        return
    sparsify(model, configs)
    try:
        schedule = SparseSchedule(model, [Phase("sparse", _LONG)], process_group=False, pack=pack)

        def scheduled() -> None:
            step()
            schedule.step()

        yield scheduled
    finally:
        densify(model)


def _runs(model: nn.Module, call: Call) -> bool:
    """Whether call runs a semi-sparse layer of model."""
    seen: list[bool] = []
    handles = [
        layer.register_forward_pre_hook(lambda *_: seen.append(True)) for layer in semi_sparse_layers(model).values()
    ]
    try:
        call()
    finally:
        for handle in handles:
            handle.remove()
    return bool(seen)
