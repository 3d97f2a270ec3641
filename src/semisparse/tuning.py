"""Choices of the autotuner: read them for a report, keep them for a later run, share them between ranks.

The first call with a problem (sizes, dtype, storage orders) measures which algorithm of cuSPARSELt, or masked dense, is
fastest; or, of a weight gradient in fp8 with grad_output="mvue", whether it is sampled at all. Ranks that measure
separately may choose differently. Every choice is right, but algorithms sum in different orders, so results may then
differ between ranks in the last bit, and one rank may sample what another does not. `share` makes all ranks use the
same choices.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from semisparse.errors import ConfigError
from semisparse.gemm.autotune.algorithm import Choice
from semisparse.gemm.autotune.autotuner import autotuner
from semisparse.gemm.autotune.store import canonical

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Choice", "choices", "load_state", "share", "state"]


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
