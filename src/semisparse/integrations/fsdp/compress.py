"""Compressed all-gathers in FSDP2: which weights, whether that fits, and what each forward needs first."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule

from semisparse.formats.layout import FP8
from semisparse.integrations.fsdp.eligible import Found, find, outermost
from semisparse.integrations.fsdp.weight import GatheredWeight
from semisparse.nn.linear import SemiSparseLinear
from semisparse.reference.fp8 import multiplier_for
from semisparse.schedule.ranks import Group, agree, attempt, digest
from semisparse.surgery.selection import Selector


@dataclass(frozen=True)
class GatherReport:
    """What compress_all_gather did.

    Attributes:
        compressed: Names of the layers whose weights are gathered compressed in sparse phases.
        whole: Names of the other layers with a pruned weight, and why each is gathered whole.
        bytes_whole: Of the weights of compressed, as they are gathered in a dense phase.
        bytes_compressed: Of what is gathered instead, with the settings that the layers have now.
    """

    compressed: tuple[str, ...]
    whole: Mapping[str, str]
    bytes_whole: int
    bytes_compressed: int


class _Forwards:
    """Hook of an outermost FSDP2 module: what its weights need before a forward gathers any of them."""

    def __init__(
        self, weights: list[GatheredWeight], owners: Mapping[GatheredWeight, FSDPModule], group: Group
    ) -> None:
        self._weights, self._owners, self._group = weights, owners, group
        self._compared = False

    @torch.compiler.disable
    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if not self._compared:  # a rank that resumed elsewhere may be in another phase, and would wait for other sizes
            agree(digest([(weight.name, weight.form) for weight in self._weights], {}), self._group)
            self._compared = True
        for weight in self._weights:
            weight.attach()
            if weight.outdated:  # the phase changed while it was gathered; FSDP2 does nothing if it is not
                self._owners[weight].reshard()
        by_group: dict[dist.ProcessGroup, list[GatheredWeight]] = {}
        for weight in self._weights:
            if weight.form == "kept in e4m3":
                by_group.setdefault(weight.parameter.shard_mesh.get_group(), []).append(weight)
        for group, weights in by_group.items():
            _share_scales(weights, group)


@torch.no_grad()
def _share_scales(weights: list[GatheredWeight], group: dist.ProcessGroup) -> None:
    """The scale of each weight from the largest magnitude in all of its shards: one reduction for all weights."""
    largest = torch.stack(torch._foreach_norm([weight.shard for weight in weights], torch.inf)).float()
    # Bits of magnitudes, because what the maximum with NaN is depends on the backend.
    bits = largest.view(torch.int32) & torch.iinfo(torch.int32).max
    dist.all_reduce(bits, dist.ReduceOp.MAX, group=group)
    multipliers = multiplier_for(bits.view(torch.float32))
    for weight, multiplier, scale in zip(weights, multipliers.unbind(), (1 / multipliers).unbind(), strict=True):
        weight.multiplier, weight.scale = multiplier, scale


def compress_all_gather(
    model: nn.Module,
    *,
    exclude: Selector | Iterable[Selector] | None = None,
    process_group: Group = None,
) -> GatherReport:
    """Let FSDP2 gather pruned weights as kept values and bitmask: 9/16 of the bytes in 16 bits, 5/16 with "fp8".

    Call it on all ranks after sparsify and fully_shard and before the first forward. Each gather prunes the shard, with
    the mask of the master weight before it is rounded to the dtype of the gather (MixedPrecisionPolicy), and the
    forward uses that mask. Parameters, gradients, optimizers and checkpoints stay as they are: shards of the dense
    master weight. The reduce-scatter of gradients stays as large as it is. In a dense phase weights are gathered whole.

    With precision="fp8" the scale of a weight needs its largest magnitude on all ranks: one reduction per forward of an
    outermost FSDP2 module, for all layers in it. The forward of a module further inside then uses the last such scales.

    Args:
        model: Has FSDP2 modules (torch.distributed.fsdp.fully_shard) and semi-sparse layers with masks "transposable"
            or "row". The number of rows that a rank holds of each weight must be a multiple of 4, the same on all.
        exclude: Layers to gather whole, as sparsify's.
        process_group: The ranks that call this with the same model, to compare settings, and phases at the first
            forward; None for all of the job, False to compare nothing.

    Returns:
        Which weights are gathered compressed.

    Raises:
        ConfigError: model has no FSDP2 module or was compressed or run before; FSDP2 has a setting that does not work
            with it (CPUOffloadPolicy, reshard_after_forward=int, fp8 gathered in fp16); a mask is another one, or held.
        NoLayerMatchedError: No weight is left to compress, or a selector matches nothing.
        ShapeError: Shards of a weight do not have a multiple of 4 rows each.
        LayerRefusedError: A weight is not sharded by FSDP2 along its rows, is shared, or is sharded otherwise, too.
        RankMismatchError: Ranks differ in layers or settings, or another rank raised one of these. Also raised by the
            first forward, if ranks are in different phases.
    """
    found: Found = []
    whole: dict[str, str] = {}

    def look() -> int:
        weights, others = find(model, exclude)
        found.extend(weights)
        whole.update(others)
        return digest([_settings(weight) for weight, _ in found], {})

    agree(attempt(look), process_group)
    weights = [weight for weight, _ in found]
    for weight in weights:
        weight.attach()
    owners = dict(found)
    for root in outermost(model):
        inside = {id(module) for module in root.modules()}
        own = [weight for weight in weights if id(weight.layer) in inside]
        if own:
            root.register_forward_pre_hook(_Forwards(own, owners, process_group), prepend=True)
    sizes = [_bytes(weight) for weight in weights]
    names = tuple(weight.name for weight in weights)
    return GatherReport(names, whole, sum(size[0] for size in sizes), sum(size[1] for size in sizes))


def _settings(weight: GatheredWeight) -> tuple[Any, ...]:
    layer, parameter = weight.layer, weight.parameter
    assert isinstance(layer, SemiSparseLinear)
    shape, ranks = (layer.out_features, layer.in_features), parameter.shard_mesh.size()
    dtypes = weight.dtype, weight.shard.dtype
    # The form also depends on the GPU: one without fp8 would send other sizes than the rest.
    return weight.name, shape, ranks, layer.sparse_config, layer.sparse_enabled, weight.form_when_sparse, dtypes


def _bytes(weight: GatheredWeight) -> tuple[int, int]:
    """Of the weight in a dense phase, and in a sparse one."""
    layer = weight.layer
    assert isinstance(layer, SemiSparseLinear)
    count = layer.out_features * layer.in_features
    itemsize = FP8.itemsize if weight.form_when_sparse == "kept in e4m3" else weight.dtype.itemsize
    return count * weight.dtype.itemsize, count // 2 * itemsize + count // 8
