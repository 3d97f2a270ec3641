"""Trying choices in the whole training step, on the model itself: what the layers' times alone do not tell.

In a step that the host bounds, a layer costs the host more between the other work of a model than in a loop of its own.
So the best choices are swapped in, timed interleaved with the dense step, and taken out again. A choice is compared
with the dense step of the same round, and has to be faster in most rounds: a host that others use is unsteady.
"""

import math
import statistics
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from semisparse.config import SparseConfig
from semisparse.errors import PlanError
from semisparse.nn import SemiSparseBase
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
from semisparse.surgery.layers import semi_sparse_layers
from semisparse.surgery.selection import linear_layers
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
        ratio: Of each round, to the dense step. Empty if the step ran out of memory.
    """

    ms: float
    ratio: tuple[float, ...]

    @property
    def pays(self) -> bool:
        """Whether it is faster by MARGIN at least, and in enough of the rounds."""
        if not self.ratio:
            return False
        faster = sum(one < 1 for one in self.ratio) / len(self.ratio)
        return statistics.median(self.ratio) < 1 - MARGIN and faster >= _AGREE


NO_MEMORY = Tried(math.inf, ())
"""A step that runs out of memory with a choice."""


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
        PlanError: model has semi-sparse layers; or step does not run its layers, or runs them in compiled code.
        Exception: What the swap or a step raises, unless a variant runs out of memory.
    """
    if sparse := semi_sparse_layers(model):
        raise PlanError(f"model is not dense: {next(iter(sparse)) or '(root)'} is semi-sparse. Densify it first")
    dense_count = calls_per_block(step, STEP_BLOCK_SECONDS)
    counts = [_calls(model, step, configs, pack) for configs in variants]
    dense: list[float] = []
    ratios: list[list[float]] = [[] for _ in variants]
    with without_full_collections(), _no_word_of_schedules():
        for _ in range(STEP_ROUNDS):
            dense.append(block_ms(step, dense_count))
            for ratio, count, configs in zip(ratios, counts, variants, strict=True):
                if count:
                    ratio.append(_block(model, step, configs, pack, count) / dense[-1])
    base = statistics.median(dense)
    return base, [Tried(base * statistics.median(one), tuple(one)) if one else NO_MEMORY for one in ratios]


def _calls(model: nn.Module, step: Call, configs: Configs, pack: Pack) -> int:
    """How many steps of a variant fill a block; 0 if it runs out of memory."""
    try:
        with training(model, step, configs, pack) as call:
            if why := _obstacle(model, call):
                raise PlanError(why)
            return calls_per_block(call, STEP_BLOCK_SECONDS)
    except torch.OutOfMemoryError:
        return 0


def _block(model: nn.Module, step: Call, configs: Configs, pack: Pack, count: int) -> float:
    """Milliseconds of a step of a variant. When this returns, nothing refers to the schedule and what it packed."""
    with training(model, step, configs, pack) as call:
        return block_ms(call, count)


@contextmanager
def training(model: nn.Module, step: Call, configs: Configs, pack: Pack) -> Iterator[Call]:
    """The step with layers of model made semi-sparse and with a schedule's; the model is dense again at the end.

    Args:
        model: Dense.
        step: As tried's.
        configs: Settings by layer name.
        pack: As SparseSchedule's.
    """
    with ExitStack() as stack:
        for found in linear_layers(model):  # before the swap, which ctrl-C may end, and also those that step replaces
            stack.callback(_make_dense, found.layer)
        sparsify(model, configs)
        schedule = SparseSchedule(model, [Phase("sparse", _LONG)], process_group=False, pack=pack)

        def scheduled() -> None:
            step()
            schedule.step()

        yield scheduled


def _make_dense(layer: nn.Linear) -> None:
    if isinstance(layer, SemiSparseBase):
        SemiSparseBase.to_dense(layer)


def _obstacle(model: nn.Module, call: Call) -> str:
    """Why call tells nothing about the semi-sparse layers of model; "" if it runs them eagerly."""
    compiled: list[bool] = []

    def hook(*_: object) -> None:
        compiled.append(torch.compiler.is_compiling())

    handles = [layer.register_forward_pre_hook(hook) for layer in semi_sparse_layers(model).values()]
    try:
        call()
    finally:
        for handle in handles:
            handle.remove()
    if not compiled:
        return "step does not run the layers of model: it may replay a graph, or run a copy of model"
    if any(compiled):
        return "step runs layers in compiled code, which each swap would compile anew: plan with mode='compiled'"
    return ""


@contextmanager
def _no_word_of_schedules() -> Iterator[None]:
    """Without a warning that the user, who has none, would not understand: that a step runs no optimizer."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"schedule\.step\(\) was called")
        yield
