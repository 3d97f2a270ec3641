"""Ranks that tune together: who measures what, and errors that reach all of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from semisparse.errors import RankMismatchError


@dataclass(frozen=True)
class Ranks:
    """The ranks that tune together; one alone without torch.distributed.

    Attributes:
        group: None for all.
        share: Makes all use the same choices.
        active: Whether there are several.
    """

    group: Any
    share: Callable[[], object]
    active: bool

    def gathered(self, mine: Any) -> list[Any]:
        """mine of every rank; an exception instead of it is raised on its rank, and reported on the others."""
        if not self.active:
            found = [mine]
        else:
            found = [None] * dist.get_world_size(self.group)
            sent = f"{type(mine).__name__}: {mine}" if isinstance(mine, BaseException) else None
            dist.all_gather_object(found, (sent, None if sent else mine), group=self.group)
            if not isinstance(mine, BaseException):
                for rank, (failed, _) in enumerate(found):
                    if failed:
                        raise RankMismatchError(f"rank {rank} of the group failed while tuning: {failed}")
                found = [value for _, value in found]
        if isinstance(mine, BaseException):
            raise mine
        return found

    @property
    def rank(self) -> int:
        """Of this process in the group."""
        return dist.get_rank(self.group) if self.active else 0


def divided(missing: Sequence[Mapping[str, float]]) -> dict[str, int]:
    """Who measures what: in turns among those that miss a problem, most work first.

    Args:
        missing: Of each rank: tuning key -> work of the problem.

    Returns:
        Key -> rank.
    """
    work: dict[str, float] = {}
    holders: dict[str, list[int]] = {}
    for rank, mine in enumerate(missing):
        for name, amount in mine.items():
            work[name] = max(work.get(name, 0.0), amount)
            holders.setdefault(name, []).append(rank)
    order = sorted(holders, key=lambda name: -work[name])
    return {name: holders[name][number % len(holders[name])] for number, name in enumerate(order)}
