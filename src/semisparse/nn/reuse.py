"""Packing once for the micro-batches of one optimizer step."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from semisparse import routes
from semisparse.formats.packed import PackedMatrix
from semisparse.nn.linear import SemiSparseLinear
from semisparse.nn.pack_together import Keep, Member, both_ways, fit, new_buffers
from semisparse.nn.packed_weight import PackedWeight, PackingLayer, in_use
from semisparse.nn.packed_weights import PackedWeights
from semisparse.operands import compute_dtype

# Buffers outlive a block, so that a compiled or captured step finds them at the same address in the next block. They
# are kept outside the modules, one pair for each compute dtype.
_KEPT: WeakKeyDictionary[PackingLayer, dict[torch.dtype, PackedMatrix]] = WeakKeyDictionary()


class _Block(PackedWeights):
    """The packed weights of one block: of one state of the weights, for one dtype, whatever happens inside."""

    def renewed(
        self, layer: PackingLayer, record: PackedWeight, weight: Tensor, dtype: torch.dtype
    ) -> PackedMatrix | None:
        if record.dtype is None:
            return None
        reason = (
            f"was entered computing in {record.dtype}, but this forward computes in {dtype}: enter torch.autocast first"
            if record.dtype is not dtype
            else "was entered with another weight or mask than this forward has: change weights outside the block"
        )
        warnings.warn(f"reuse_packed {reason}. The weight is packed again at this forward.", stacklevel=6)
        return None

    def held_changed(self, layer: PackingLayer, record: PackedWeight) -> None:
        """The layer packs at each forward until the block ends."""
        record.dtype = None
        warnings.warn(
            "reuse_packed was entered with another mask or scale: call hold outside the block. The weight is packed "
            "again at each forward of the block.",
            stacklevel=4,
        )

    def _dtype(self, weight: Tensor) -> torch.dtype:
        return compute_dtype(weight, weight)

    def _buffers(self, member: Member) -> PackedMatrix:
        """Those of earlier blocks, unless an outer block uses them."""
        both, kept = both_ways(member, self._keep), _KEPT.setdefault(member.layer, {})
        found = kept.get(member.dtype)
        if found is None or not fit(found, member.weight, member.dtype, both):
            found = kept[member.dtype] = new_buffers(member.weight, member.dtype, both)
        return new_buffers(member.weight, member.dtype, both) if in_use(member.layer, found) else found


@contextmanager
def reuse_packed(model: nn.Module, *, keep: Keep = "both") -> Iterator[int]:
    """Inside the block every SemiSparseLinear of model multiplies with its weight as packed on entry.

    For gradient accumulation: enter once per optimizer step, run the forward and backward passes of all micro-batches
    inside, call optimizer.step() outside. Weights of one dtype and mask are packed in one launch.

    The weight is packed for the dtype that is computed in on entry, so enter torch.autocast first, if it is used. A
    forward in another dtype, or with a weight that has changed since, packs again for itself and warns. Two kinds of
    change are not detected, and the block goes on with the old weight: one in compiled code and one through
    weight.data. A layer that holds other codes or another scale is detected in compiled code, too.

    With keep="forward", run the backward of a forward in torch.utils.checkpoint(use_reentrant=False) inside the block,
    too. After the block a forward that is computed again packs both directions and saves other tensors than the first
    one, so that torch raises CheckpointError. With keep="both" the same tensors are saved.

    Blocks nest and may end in any order. A copy made inside a block packs its own weight. Buffers are kept between
    blocks, outside any CUDA graph: 9/8 of the weight's 16-bit bytes for both directions together, per dtype; in fp8
    5/8 of these bytes, whatever keep says.

    Args:
        model: Any module. Layers on the masked-dense route (CPU, fp32, sizes that are not multiples of 16), layers with
            a pruned activation, and weights that cannot be packed between forwards (see PackedWeights) work as always.
        keep: As PackedWeights'.

    Yields:
        The number of layers that were packed.

    Raises:
        ConfigError: model is not a module, keep is not one of its values, or a layer's mask needs a scale that is not
            set.
        EngineError: A layer with backend="cusparselt" cannot be packed here. All layers are then as before.
    """
    block = _Block(model, keep=keep)
    for layer in model.modules():
        if isinstance(layer, SemiSparseLinear) and layer.sparse_enabled and layer.has_mask:
            _check_route(layer)
    try:
        yield block.pack(everything=True)
    finally:
        block.close()


def _check_route(layer: SemiSparseLinear) -> None:
    """Raise the EngineError that the forward of layer would raise here."""
    weight, config = layer.weight, layer.sparse_config
    dtype = compute_dtype(weight, weight)
    if config.precision is None or not routes.takes_fp8(weight, dtype, config.weight, config.backend):
        routes.packs(weight, dtype, config.backend)
