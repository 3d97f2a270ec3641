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

    For gradient accumulation: enter once for each optimizer step, run all micro-batches' forward and backward passes
    inside, call optimizer.step() outside. Yields the number of layers packed; layers on the masked-dense route (CPU,
    fp32, sizes no multiple of 16) and layers with a pruned activation are not among them and work as always.
    The packing is for the dtype that is computed in on entry, so enter torch.autocast first, where it is used. A
    forward in another dtype, or with a weight that has changed since, packs again for itself and warns. Not seen, so
    that the block goes on with the old weight: a change in compiled code, and one by weight.data. Blocks nest and may
    end in any order, and a copy made inside a block packs its own weight. Buffers are kept between blocks (9/8 of a
    weight's 16-bit bytes for both directions and each dtype), allocated outside any CUDA graph. Raises ConfigError for
    what is no module and what packing raises, with every layer as it was.
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
