"""Comparing what the ranks of a data-parallel job hold, so that none trains with other masks than the rest."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from semisparse.errors import RankMismatchError

if TYPE_CHECKING:
    Group: TypeAlias = dist.ProcessGroup | Literal[False] | None
else:  # torch may have been built without torch.distributed
    Group = Any
"""The data-parallel group: None for all ranks of the job, False to compare nothing."""

_MIX = (-7046029254386353131, -4658895280553007687)  # odd 64-bit constants of splitmix64


def digest(settings: Any, tensors: Mapping[str, Tensor]) -> int:
    """62 bits that depend on all settings and tensors.

    Tensors are hashed on their devices, exactly and in any order of summation: integer arithmetic modulo 2^64.

    Args:
        settings: Anything with a repr that says all of it.
        tensors: Integer or fp32 tensors by name; sharded ones are left out.
    """
    parts = [repr(settings)]
    sums = [(name, _mixed(tensor)) for name, tensor in sorted(tensors.items()) if not hasattr(tensor, "full_tensor")]
    parts += [f"{name}={int(value.item())}" for name, value in sums]
    return int.from_bytes(hashlib.sha256("\n".join(parts).encode()).digest()[:8]) >> 2


def attempt(work: Callable[[], int]) -> int | Exception:
    """What work returns, or the exception that it raises; both can be passed to agree()."""
    try:
        return work()
    except Exception as error:
        return error


def agree(mine: int | Exception, group: Group = None) -> None:
    """Raise on every rank of group unless all ranks pass the same digest.

    One reduction, which comes before a local exception is raised again: a rank that fails alone does not leave the
    others waiting. Without torch.distributed, or with group=False, only a local exception is raised. Ranks that are not
    in group compare nothing.

    Args:
        mine: The digest of this rank, or the exception that it raised instead.
        group: The ranks to compare.

    Raises:
        RankMismatchError: The digests differ, or another rank raised an exception.
        Exception: mine, if it is one.
    """
    if group is not False and dist.is_available() and dist.is_initialized() and _is_member(group):
        value = mine if isinstance(mine, int) else digest((type(mine).__name__, str(mine)), {})
        both = torch.tensor([value, -value], dtype=torch.int64, device=_device(group))
        dist.all_reduce(both, dist.ReduceOp.MAX, group=group)
        highest, lowest = both[0].item(), -both[1].item()
        if highest != lowest and isinstance(mine, int):
            raise RankMismatchError(
                "the ranks do not hold the same semi-sparse layers, settings, steps and held masks (or one of them "
                "failed: see its error). Swap the same layers on every rank, and start a recipe that holds masks or "
                "scales after the weights are equal: after wrapping in DistributedDataParallel, or with one seed. If "
                "ranks hold different parts of a model, pass the data-parallel group as process_group, or False to "
                "compare nothing"
            )
    if isinstance(mine, Exception):
        raise mine


def called_anywhere(called: list[bool], group: Group = None) -> list[bool]:
    """For each layer, whether any rank of group called it; one reduction if there are ranks.

    Args:
        called: The same of this rank alone.
        group: The ranks that share it.
    """
    if group is False or not dist.is_available() or not dist.is_initialized() or not _is_member(group):
        return called
    flags = torch.tensor(called, dtype=torch.int32, device=_device(group))
    dist.all_reduce(flags, dist.ReduceOp.MAX, group=group)
    return [bool(flag) for flag in flags.tolist()]


def mean_over_ranks(values: Tensor, group: Group = None) -> list[float]:
    """The mean of each value over the ranks of group, with the same bits on each; NaN where one is not finite.

    One all-gather and a correctly rounded sum, so that a decision taken on it is the same on every rank. Without
    torch.distributed, or with group=False, the values of this rank. Synchronises with the device.

    Args:
        values: fp32, one-dimensional, as many on each rank.
        group: The ranks.
    """
    ranks = [values]
    if group is not False and dist.is_available() and dist.is_initialized() and _is_member(group):
        mine = values.to(_device(group))
        ranks = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(ranks, mine, group=group)
    columns = zip(*torch.stack(ranks).tolist(), strict=True)
    return [math.fsum(each) / len(each) if all(map(math.isfinite, each)) else math.nan for each in columns]


def _is_member(group: dist.ProcessGroup | None) -> bool:
    return dist.get_rank(group) >= 0


def _device(group: dist.ProcessGroup | None) -> torch.device:
    """The device that tensors must be on for the group's backend."""
    backend = str(dist.get_backend_config(group))
    if "cpu" in backend or "gloo" in backend or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def _mixed(tensor: Tensor) -> Tensor:
    """One int64 that depends on each element and its position."""
    bits = tensor.detach().contiguous()
    bits = bits.view(torch.int32) if bits.dtype == torch.float32 else bits
    value = bits.reshape(-1).to(torch.int64)
    value = (value + 1) * _MIX[0] + torch.arange(value.numel(), device=value.device) * _MIX[1]
    value = (value ^ (value >> 29)) * _MIX[1]
    return (value ^ (value >> 32)).sum()
