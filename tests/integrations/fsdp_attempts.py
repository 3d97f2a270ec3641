"""What two ranks try with compressed all-gathers, and the error that each ends in. Imported by spawned workers."""

from collections.abc import Callable
from unittest.mock import patch

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

from semisparse import MaskMetrics, SparseConfig, SparseSchedule, mask_statistics, routes, sparsify
from semisparse.errors import SemiSparseError
from semisparse.integrations.fsdp import compress_all_gather
from tests.integrations.fsdp_ranks import inputs, net, sharded


def uneven(rank: int) -> None:
    model = nn.Sequential(nn.Linear(32, 12))
    sparsify(model)
    compress_all_gather(fully_shard(model))


def uneven_excluded(rank: int) -> None:
    model = nn.Sequential(nn.Linear(32, 12), nn.Linear(12, 16))
    sparsify(model)
    report = compress_all_gather(fully_shard(model), exclude="0")
    assert report.compressed == ("1",) and report.whole == {"0": "it is excluded"}


def not_sharded(rank: int) -> None:
    compress_all_gather(net())


def partly_sharded(rank: int) -> None:
    model = net()
    fully_shard(model[0])
    compress_all_gather(model)


def not_swapped(rank: int) -> None:
    compress_all_gather(fully_shard(nn.Sequential(nn.Linear(32, 32))))


def swapped_after_its_layers_were_sharded(rank: int) -> None:
    model = nn.Sequential(nn.Linear(32, 32))
    fully_shard(model[0])
    sparsify(model)


def swapped_after_the_root_was_sharded(rank: int) -> None:
    model = fully_shard(nn.Sequential(nn.Linear(32, 32)))
    sparsify(model)
    assert compress_all_gather(model).compressed == ("0",)
    assert model(inputs(0)[rank]).isfinite().all()


def twice(rank: int) -> None:
    model = sharded(net())
    compress_all_gather(model)
    compress_all_gather(model)


def after_a_forward(rank: int) -> None:
    model = sharded(net())
    model(inputs(0)[rank])
    compress_all_gather(model)


def other_mask_on_one(rank: int) -> None:
    compress_all_gather(sharded(net(SparseConfig(weight="row" if rank else "transposable"))))


def excluded_on_one(rank: int) -> None:
    compress_all_gather(sharded(net()), exclude="0" if rank else None)


def bad_argument_on_one(rank: int) -> None:
    compress_all_gather(sharded(net()), exclude="nothing" if rank else None)


def greedy(rank: int) -> None:
    compress_all_gather(sharded(net(SparseConfig(weight="greedy"))))


def held_before(rank: int) -> None:
    model = sharded(net())
    model[0].hold(codes=torch.zeros(8, 8, dtype=torch.int16))
    compress_all_gather(model)


def held_after(rank: int) -> None:
    model = sharded(net())
    compress_all_gather(model)
    model[0].hold(codes=torch.zeros(8, 8, dtype=torch.int16))
    model(inputs(0)[rank])


def fp8_in_fp16(rank: int) -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.float16)
    compress_all_gather(sharded(net(SparseConfig(precision="fp8")), policy))


def a_gpu_without_fp8_on_one(rank: int) -> None:
    model = sharded(net(SparseConfig(precision="fp8")))
    with patch.object(routes, "takes_fp8", lambda *given: rank == 0):
        compress_all_gather(model)


def resumed_elsewhere(rank: int) -> None:
    model = sharded(net())
    compress_all_gather(model)
    SparseSchedule.sparse_then_dense(model, 10).resume_at(8 * rank)
    model(inputs(0)[rank])


def inner_module_first(rank: int) -> None:
    model = sharded(net(SparseConfig(precision="fp8")))
    compress_all_gather(model)
    model[0](inputs(0)[rank])


def offloaded(rank: int) -> None:
    compress_all_gather(sharded(net(), offload_policy=CPUOffloadPolicy(pin_memory=False)))


def tied(rank: int) -> None:
    model = net()
    model[1].weight = model[0].weight
    compress_all_gather(fully_shard(model))


def metrics_of_shards(rank: int) -> None:
    MaskMetrics(sharded(net()))


def metrics_of_what_was_sharded_since(rank: int) -> None:
    model = net()
    metrics = MaskMetrics(model, interval=2)
    sharded(model)
    metrics.update()


def statistics_of_shards(rank: int) -> None:
    mask_statistics(sharded(net()))


def pruned_weight_of_a_shard(rank: int) -> None:
    sharded(net())[0].pruned_weight()


def statistics_of_gathered_weights(rank: int) -> None:
    model = sharded(net())
    for layer in model:
        layer.unshard()
    assert mask_statistics(model) == mask_statistics(net())


BOTH = {
    uneven: "ShapeError",
    uneven_excluded: "",
    not_sharded: "ConfigError",
    partly_sharded: "LayerRefusedError",
    not_swapped: "NoLayerMatchedError",
    swapped_after_its_layers_were_sharded: "NoLayerMatchedError",
    swapped_after_the_root_was_sharded: "",
    twice: "ConfigError",
    after_a_forward: "ConfigError",
    other_mask_on_one: "RankMismatchError",
    excluded_on_one: "RankMismatchError",
    greedy: "ConfigError",
    held_before: "ConfigError",
    held_after: "ConfigError",
    fp8_in_fp16: "ConfigError",
    a_gpu_without_fp8_on_one: "RankMismatchError",
    inner_module_first: "ConfigError",
    resumed_elsewhere: "RankMismatchError",
    offloaded: "ConfigError",
    tied: "LayerRefusedError",
    metrics_of_shards: "LayerRefusedError",
    metrics_of_what_was_sharded_since: "LayerRefusedError",
    statistics_of_shards: "LayerRefusedError",
    pruned_weight_of_a_shard: "LayerRefusedError",
    statistics_of_gathered_weights: "",
}
"""How each attempt ends on both ranks."""
ENDS: dict[Callable[[int], None], tuple[str, str]] = {attempt: (end, end) for attempt, end in BOTH.items()}
ENDS[bad_argument_on_one] = ("RankMismatchError", "NoLayerMatchedError")


def ended(attempt: Callable[[int], None], rank: int) -> str:
    try:
        attempt(rank)
    except SemiSparseError as error:
        return type(error).__name__
    return ""
