"""Choices of the autotuner: read them for a report, keep them for a later run, share them between ranks.

The first call with a problem (sizes, dtype, storage orders) measures which algorithm of cuSPARSELt, or masked dense, is
fastest; or, of a weight gradient in fp8 with grad_output="mvue", whether it is sampled at all. `tune` does that for a
whole model, before the first step. Ranks that measure separately may choose differently. Every choice is right, but
algorithms sum in different orders, so results may then differ between ranks in the last bit, and one rank may sample
what another does not. `share` makes all ranks use the same choices, and so does `tune`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import nn

from semisparse._tune import tuned
from semisparse.arguments import check_budget, check_progress
from semisparse.errors import ConfigError
from semisparse.gemm.autotune.algorithm import Choice
from semisparse.gemm.autotune.autotuner import autotuner
from semisparse.gemm.autotune.store import canonical
from semisparse.planning.ranks import Ranks
from semisparse.planning.tuned import TunedProblem, TuningReport

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Choice", "TunedProblem", "TuningReport", "choices", "load_state", "share", "state", "tune"]

logger = logging.getLogger(__name__)


def tune(
    model: nn.Module,
    *inputs: Any,
    seconds: float | None = None,
    progress: Callable[[str], None] = logger.info,
    group: ProcessGroup | None = None,
    **keywords: Any,
) -> TuningReport:
    """Choose the algorithms of all products of a model's semi-sparse layers now, instead of at the first steps.

    One forward finds the distinct problems of a step: forward, input gradient and weight gradient, in 16 bits and fp8,
    of layers in a dense phase, too. Problems without a choice are measured on random operands, for half a second
    each. Choices are kept where those of first calls are. Parameters, buffers, gradients, hooks and random number
    generators stay as they are, which needs memory for one copy of the model.

    A collective call where torch.distributed is initialized: ranks share what they know, divide what is missing among
    those that miss it, and share again, so that all use the same choices.

    Args:
        model: With semi-sparse layers. Call tune as you train: in the same autocast, in train mode.
        *inputs: Of one forward, at the size of a training step.
        seconds: Budget, for each rank. A problem that is begun is finished; what is not reached is left out and said to
            be. Default: no limit.
        progress: Gets a line of text per measured problem; print, for example.
        group: The ranks that tune together; default: all of them.
        **keywords: Of the forward. Names that are arguments of tune itself cannot be passed on.

    Returns:
        Per problem: tuned now, measured before, from the table that ships with the package, or left out and why; and
        the layers that have no product to tune. Without rows where the inputs reach no sparse product.

    Raises:
        NoLayerMatchedError: model has no semi-sparse layer.
        ConfigError: seconds or progress is not what it should be, or SEMISPARSE_TUNE is not among its values.
        RankMismatchError: Another rank failed.
        Exception: Whatever the model's forward or progress raises.
    """
    check_budget(seconds)
    check_progress(progress)
    active = dist.is_available() and dist.is_initialized() and dist.get_rank(group) >= 0
    return tuned(model, inputs, keywords, seconds, progress, Ranks(group, lambda: share(group), active))


def choices() -> list[tuple[dict[str, object], Choice]]:
    """What this process measured, read from disk or took over so far, for reports.

    Returns:
        (key, choice) per problem. The key holds all that the choice depends on, as JSON values: GPU, driver, versions,
        dtype, storage orders and sizes, with the token count rounded up to its bucket. Of the choice whether a weight
        gradient is sampled, "way" in the key and `decides` of the choice tell.
    """
    return autotuner().choices()


def state() -> dict[str, Any]:
    """These choices as JSON values, for `load_state` on another rank or in a later run."""
    return autotuner().state()


def load_state(state: Mapping[str, Any]) -> int:
    """Adopt choices made elsewhere; they replace this process's own.

    A choice is used only where its whole key agrees, so those of another GPU or version do nothing. One whose algorithm
    the library does not offer here is dropped and logged at the first call with its problem, and that problem is tuned.

    Args:
        state: As `state` returns it.

    Returns:
        How many choices there were.

    Raises:
        ConfigError: The state is damaged; nothing of it is adopted.
    """
    return autotuner().load_state(state)


def share(group: ProcessGroup | None = None) -> int:
    """Make all ranks of a group use the same choices: those of all ranks together. A collective call.

    Where several ranks measured one problem, the lowest rank's choice is used on all. Problems that come up
    later are not covered: call it after the first steps, or again.

    Args:
        group: The process group; default: all ranks.

    Returns:
        How many choices the ranks share; 0 on a rank outside the group.

    Raises:
        ConfigError: torch.distributed is not initialized.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise ConfigError("torch.distributed is not initialized, so there are no ranks: call init_process_group first")
    if dist.get_rank(group) < 0:
        return 0
    states: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(states, state(), group=group)
    for other in reversed(states):  # of the same problem the last one counts
        load_state(other)
    return len({canonical(entry["key"]) for other in states for entry in other["choices"]})
