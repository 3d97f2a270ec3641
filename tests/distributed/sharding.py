"""The ways in which a model is distributed, and when its layers are swapped. Imported by spawned workers."""

from collections.abc import Callable

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

Swap = Callable[[nn.Module], object]
Way = Callable[[nn.Sequential, Swap], nn.Module]


def layers_of(model: nn.Sequential) -> list[nn.Module]:
    return [layer for layer in model if isinstance(layer, nn.Linear)]


def ddp(model: nn.Sequential, swap: Swap) -> nn.Module:
    swap(model)
    return DistributedDataParallel(model)


def root(model: nn.Sequential, swap: Swap) -> nn.Module:
    swap(model)
    return fully_shard(model)


def layers(
    model: nn.Sequential, swap: Swap, offload: OffloadPolicy | None = None, reshard: bool | None = None
) -> nn.Module:
    swap(model)
    for layer in (*layers_of(model), model):
        fully_shard(layer, offload_policy=offload or OffloadPolicy(), reshard_after_forward=reshard)
    return model


def offloaded(model: nn.Sequential, swap: Swap) -> nn.Module:
    return layers(model, swap, CPUOffloadPolicy(pin_memory=False))


def resharded(model: nn.Sequential, swap: Swap) -> nn.Module:
    """Weights are gathered again for the backward, the root's too."""
    return layers(model, swap, reshard=True)


def kept(model: nn.Sequential, swap: Swap) -> nn.Module:
    """Weights stay gathered from the forward to the backward."""
    return layers(model, swap, reshard=False)


def swapped_after_root(model: nn.Sequential, swap: Swap) -> nn.Module:
    fully_shard(model)
    swap(model)
    return model


def swapped_after_blocks(model: nn.Sequential, swap: Swap) -> nn.Module:
    blocks = nn.Sequential(model[:2], model[2:4], model[4:])
    for block in blocks:
        fully_shard(block)
    return swapped_after_root(blocks, swap)


def from_meta(model: nn.Sequential, swap: Swap) -> nn.Module:
    """Built and swapped without memory; the weights come from a full state dict of the first rank."""
    weights = model.state_dict()
    model.to("meta")
    layers(model, swap)
    model.to_empty(device="cpu")
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, weights if torch.distributed.get_rank() == 0 else {}, options=options)
    return model


def compiled(model: nn.Module, swap: Swap, features: int) -> nn.Module:
    """Compiled, and run forward and backward, before the swap."""
    model.compile(backend="eager")
    dtype = next(model.parameters()).dtype
    model(torch.ones(1, features, dtype=dtype)).sum().backward()
    model.zero_grad()
    swap(model)
    return model


def ddp_compiled(model: nn.Sequential, swap: Swap) -> nn.Module:
    return compiled(DistributedDataParallel(model), swap, model[0].in_features)


def root_compiled(model: nn.Sequential, swap: Swap) -> nn.Module:
    return compiled(fully_shard(model), swap, model[0].in_features)


WAYS: dict[str, Way] = {
    "ddp": ddp,
    "fsdp_root": root,
    "fsdp_layers": layers,
    "fsdp_offload": offloaded,
    "fsdp_resharded": resharded,
    "fsdp_kept": kept,
    "fsdp_swapped_after_root": swapped_after_root,
    "fsdp_swapped_after_blocks": swapped_after_blocks,
    "fsdp_from_meta": from_meta,
    "ddp_compiled_before_the_swap": ddp_compiled,
    "fsdp_compiled_before_the_swap": root_compiled,
}
EVERY = ("ddp", "fsdp_root", "fsdp_layers")
"""Tried with every operand and optimizer; the others with fewer."""
