"""Packing once for the micro-batches of one optimizer step."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from semisparse.arguments import check_module
from semisparse.nn.linear import SemiSparseLinear
from semisparse.nn.packed_weights import PackedWeight, close_block, open_block


@contextmanager
def reuse_packed(model: nn.Module) -> Iterator[int]:
    """Inside the block every SemiSparseLinear of model multiplies with its weight as packed on entry.

    For gradient accumulation: enter once per optimizer step, run the forward and backward passes of all micro-batches
    inside, call optimizer.step() outside.

    The weight is packed for the dtype that is computed in on entry, so enter torch.autocast first, if it is used. A
    forward in another dtype, or with a weight that has changed since, packs again for itself and warns. Two kinds of
    change are not detected, and the block goes on with the old weight: one in compiled code and one through
    weight.data.

    Blocks nest and may end in any order. A copy made inside a block packs its own weight. Buffers are kept between
    blocks, outside any CUDA graph: 9/8 of the weight's 16-bit bytes for both directions together, per dtype.

    Args:
        model: Any module. Layers on the masked-dense route (CPU, fp32, sizes that are not multiples of 16) and layers
            with a pruned activation work as always.

    Yields:
        The number of layers that were packed.

    Raises:
        ConfigError: model is not a module.
        EngineError: A layer with backend="cusparselt" cannot be packed here. All layers are then as before.
    """
    check_module(model)
    opened: list[tuple[SemiSparseLinear, PackedWeight]] = []
    try:
        for layer in model.modules():
            if isinstance(layer, SemiSparseLinear) and layer.sparse_enabled:
                packed = open_block(layer)
                if packed is not None:
                    opened.append((layer, packed))
        yield len(opened)
    finally:
        for layer, packed in opened:
            close_block(layer, packed)
