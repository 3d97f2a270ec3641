"""Packing once for the micro-batches of one optimizer step."""

from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from semisparse import ops
from semisparse.functional import frozen_mask, packs
from semisparse.nn.linear import SemiSparseLinear

# Buffers outlive a block, so that a compiled or captured step finds them at the same address in the next block. They
# are kept outside the modules, so that deepcopy, pickle and state_dict never see them.
_BUFFERS: WeakKeyDictionary[SemiSparseLinear, tuple[Tensor, Tensor]] = WeakKeyDictionary()


@contextmanager
def reuse_packed(model: nn.Module) -> Iterator[int]:
    """Inside the block every SemiSparseLinear of model multiplies with its weight as packed on entry.

    For gradient accumulation: enter once for each optimizer step, run all micro-batches' forward and backward passes
    inside, call optimizer.step() outside. Yields the number of layers packed; layers on the masked-dense route (CPU,
    fp32, sizes no multiple of 16) and layers with a pruned activation are not among them and work as always.
    The packing is for the dtype that is computed in on entry, so enter torch.autocast first, where it is used. Changing
    a weight inside the block is not supported: the block would go on with the old one. Buffers are kept between blocks
    (9/8 of a weight's 16-bit bytes for both directions), allocated outside any CUDA graph.
    """
    layers = []
    for layer in model.modules():
        if isinstance(layer, SemiSparseLinear) and layer.sparse_enabled:
            dtype = _entry_dtype(layer.weight)
            if packs(layer.weight, dtype, layer.config.engine):
                layer._packed = _packed_into_buffers(layer, dtype)
                layers.append(layer)
    try:
        yield len(layers)
    finally:
        for layer in layers:
            layer.__dict__.pop("_packed", None)


def _entry_dtype(weight: Tensor) -> torch.dtype:
    if torch.is_autocast_enabled(weight.device.type) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(weight.device.type)
    return weight.dtype


def _packed_into_buffers(layer: SemiSparseLinear, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    fresh = ops.pack(layer.weight.detach(), dtype, frozen_mask(layer.config.mask, layer._frozen), layer._frozen)
    kept = _BUFFERS.get(layer)
    if kept is None or any(a.shape != b.shape or a.device != b.device for a, b in zip(kept, fresh, strict=True)):
        _BUFFERS[layer] = fresh
        return fresh
    for buffer, new in zip(kept, fresh, strict=True):
        buffer.copy_(new)
    return kept
