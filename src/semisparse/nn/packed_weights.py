"""Ownership of packed weights: what each was packed from, where its buffers are kept, and when it may be used.

A packed weight belongs to one state of one weight and to one compute dtype. It stays with its layer: copies, pickles
and state_dicts do not contain it.
"""

import warnings
from functools import cache
from typing import NamedTuple, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from semisparse import ops, routes
from semisparse.config import SparseConfig
from semisparse.formats.packed import PackedMatrix
from semisparse.masks import MaskName
from semisparse.operands import compute_dtype
from semisparse.tracing import recording


class PackedWeight(NamedTuple):
    """A packed weight, and what it was made from.

    Attributes:
        packed: Its buffers.
        dtype: The compute dtype.
        source: Weight, held tensors and settings at the time of packing, as _source gives them.
    """

    packed: PackedMatrix
    dtype: torch.dtype
    source: tuple[object, ...]

    def __deepcopy__(self, memo: object) -> None:
        """None: a copy of a layer packs its own weight. (Parametrised modules copy their dict, not their state.)"""

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


class PackingLayer(Protocol):
    """The part of SemiSparseLinear that packing needs."""

    weight: Tensor
    sparse_config: SparseConfig
    held_codes: Tensor | None
    held_scale: Tensor | None

    @property
    def _mask(self) -> MaskName:
        """The name of its mask."""
        ...

    _packed: PackedWeight | None


# The packed weights of open blocks, innermost last.
_OPEN: WeakKeyDictionary[PackingLayer, list[PackedWeight]] = WeakKeyDictionary()
# Buffers outlive a block, so that a compiled or captured step finds them at the same address in the next block. They
# are kept outside the modules, one pair for each compute dtype.
_BUFFERS: WeakKeyDictionary[PackingLayer, dict[torch.dtype, PackedWeight]] = WeakKeyDictionary()


def open_block(layer: PackingLayer) -> PackedWeight | None:
    """Pack the current weight of layer for the dtype that a forward would compute in now, and let forwards use it.

    Writes to the buffers that the layer already has, unless an outer block uses them. Buffers are ordinary tensors also
    under inference_mode, so that a later training step can use them.

    Args:
        layer: A layer with a pruned weight.

    Returns:
        The packed weight; None if a forward would take the masked-dense route.

    Raises:
        ConfigError: The layer's mask needs a scale that is not set.
        EngineError: backend="cusparselt" cannot run here.
    """
    dtype = compute_dtype(layer.weight, layer.weight)
    if not routes.packs(layer.weight, dtype, layer.sparse_config.backend):
        return None
    packed = _packed(layer, dtype)
    _OPEN.setdefault(layer, []).append(packed)
    layer._packed = packed
    _fused_steps_show()
    return packed


def close_block(layer: PackingLayer, packed: PackedWeight) -> None:
    """Drop the packed weight of one block. Blocks may end in any order."""
    left = [other for other in _OPEN.get(layer, ()) if other is not packed]
    if left:
        _OPEN[layer], layer._packed = left, left[-1]
    else:
        _OPEN.pop(layer, None)
        layer.__dict__.pop("_packed", None)


def _packed(layer: PackingLayer, dtype: torch.dtype) -> PackedWeight:
    with torch.inference_mode(False), torch.no_grad():
        buffers = ops.pack(layer.weight.detach(), dtype, layer._mask, layer.held_codes, layer.held_scale)
        fresh = PackedWeight(PackedMatrix(*buffers), dtype, _source(layer))
        kept = _BUFFERS.setdefault(layer, {}).get(dtype)
        if kept is None or not _same_place(kept, fresh):
            _BUFFERS[layer][dtype] = fresh
            return fresh
        if any(other.packed.matrix is kept.packed.matrix for other in _OPEN.get(layer, ())):
            return fresh
        kept.packed.matrix.copy_(fresh.packed.matrix)
        kept.packed.transposed.copy_(fresh.packed.transposed)
    return fresh._replace(packed=kept.packed)


def usable(layer: PackingLayer, x: Tensor) -> PackedMatrix | None:
    """The packed weight for this forward; None, with a warning, if it has another dtype or the weight has changed.

    In compiled code only the dtype is compared: versions cannot be read there.

    Args:
        layer: The layer whose forward runs.
        x: Its input.
    """
    packed = layer._packed
    if packed is None or recording():  # a recorded graph packs the weight that it will be run with
        return None
    dtype = compute_dtype(x, layer.weight)
    if packed.dtype is dtype and (torch.compiler.is_compiling() or packed.source == _source(layer)):
        return packed.packed
    if not torch.compiler.is_compiling():
        _warn(packed, dtype)
    return None


def _warn(packed: PackedWeight, dtype: torch.dtype) -> None:
    reason = (
        f"was entered computing in {packed.dtype}, but this forward computes in {dtype}: enter torch.autocast first"
        if packed.dtype is not dtype
        else "was entered with another weight or mask than this forward has: change weights outside the block"
    )
    warnings.warn(f"reuse_packed {reason}. The weight is packed again at this forward.", stacklevel=5)


def _source(layer: PackingLayer) -> tuple[object, ...]:
    """What a packed weight depends on: weight, held tensors and settings. Writes through .data leave no trace here."""
    held = (*_state(layer.held_codes), *_state(layer.held_scale))
    return (*_state(layer.weight), *held, layer.sparse_config)


def _state(tensor: Tensor | None) -> tuple[int, ...]:
    if tensor is None:
        return ()
    return id(tensor), tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version


@cache
def _fused_steps_show() -> None:
    """Raise the version of weights in open blocks after fused optimizer steps; torch 2.11 to 2.13 do not."""
    register_optimizer_step_post_hook(_raise_versions)


def _raise_versions(optimizer: torch.optim.Optimizer, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
    if torch.compiler.is_compiling() or not _OPEN:
        return
    fused = {id(p) for group in optimizer.param_groups if group.get("fused") for p in group["params"]}
    for layer in list(_OPEN):
        if id(layer.weight) in fused and not layer.weight.is_inference():
            torch.autograd.graph.increment_version(layer.weight)


def _same_place(kept: PackedWeight, fresh: PackedWeight) -> bool:
    pairs = ((kept.packed.matrix, fresh.packed.matrix), (kept.packed.transposed, fresh.packed.transposed))
    return all(a.shape == b.shape and a.device == b.device for a, b in pairs)
