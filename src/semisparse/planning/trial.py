"""Trying choices in the whole training step, on the model itself: what the layers' times alone do not tell.

In a step that the host bounds, a layer costs the host more between the other work of a model than in a loop of its own.
So the best choices are swapped in, timed interleaved with the dense step, and taken out again. A choice is compared
with the dense step of the same round, and has to be faster in most rounds: a host that others use is unsteady.
"""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from semisparse.config import SparseConfig
from semisparse.errors import PlanError
from semisparse.planning.timing import (
    STEP_BLOCK_SECONDS,
    STEP_ROUNDS,
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
MARGIN = 0.01
"""A choice must save this share of the whole step."""
_AGREE = 0.75
"""Share of the rounds in which it must be faster than the dense step: 12 of 16, seen by chance 4 times in 100."""

_LONG = 2**40
"""Steps of a phase that does not end here."""


@dataclass(frozen=True)
class Tried:
    """A step with one choice, beside the dense step.

    Attributes:
        ms: Of the dense step's median, times the median of ratio over the rounds.
        ratio: Of each round, to the dense step.
    """

    ms: float
    ratio: tuple[float, ...]

    @property
    def pays(self) -> bool:
        """Whether it is faster by MARGIN at least, and in enough of the rounds."""
        faster = sum(one < 1 for one in self.ratio) / len(self.ratio)
        return statistics.median(self.ratio) < 1 - MARGIN and faster >= _AGREE


Trial = Callable[[Sequence[Configs]], tuple[float, list[Tried]]]
"""Milliseconds of the dense step, and a step with each of these settings by layer name."""


def tried(
    model: nn.Module, step: Call, variants: Sequence[Configs], pack: Pack = "each_forward"
) -> tuple[float, list[Tried]]:
    """Time training steps with each variant swapped into model, interleaved with the dense one and sustained.

    The model is dense again afterwards, whatever happens; its weights are those that the steps have trained.

    Args:
        model: Dense.
        step: Enqueues one training step of model, eagerly, with its optimizer's.
        variants: Settings by layer name, of one layer at least each.
        pack: As SparseSchedule's.

    Returns:
        Milliseconds of the dense step, its median, and what each variant took beside it.

    Raises:
        PlanError: step does not run the layers of model: it may replay a graph, or run a copy.
        Exception: What the swap or a step raises.
    """
    counts = [calls_per_block(step, STEP_BLOCK_SECONDS)]
    for configs in variants:
        with training(model, step, configs, pack) as call:
            if not _runs(model, call):
                raise PlanError("step does not run the layers of model: it may replay a graph, or run a copy of model")
            counts.append(calls_per_block(call, STEP_BLOCK_SECONDS))
    dense: list[float] = []
    ratios: list[list[float]] = [[] for _ in variants]
    with without_full_collections():
        for _ in range(STEP_ROUNDS):
            dense.append(block_ms(step, counts[0]))
            for ratio, count, configs in zip(ratios, counts[1:], variants, strict=True):
                with training(model, step, configs, pack) as call:
                    ratio.append(block_ms(call, count) / dense[-1])
    base = statistics.median(dense)
    return base, [Tried(base * statistics.median(ratio), tuple(ratio)) for ratio in ratios]


@contextmanager
def training(model: nn.Module, step: Call, configs: Configs, pack: Pack) -> Iterator[Call]:
    """The step with layers of model made semi-sparse and with a schedule's; the model is dense again at the end.

    Args:
        model: Dense.
        step: As tried's.
        configs: Settings by layer name.
        pack: As SparseSchedule's.
    """
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
