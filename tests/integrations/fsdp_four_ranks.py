"""What four gloo processes do with compressed all-gathers. Imported by spawned workers."""

from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from semisparse import SparseConfig
from semisparse.integrations.fsdp import compress_all_gather
from tests.distributed import checkpoints
from tests.integrations.fsdp_attempts import ended
from tests.integrations.fsdp_ranks import STEPS, inputs, net, sharded, steps

FOUR = 4


def replicated(config: SparseConfig | None) -> list[list[Tensor]]:
    """Shards on two ranks, replicas on two, with and without compression."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    found = []
    for compress in (True, False):
        model = net(config)
        for layer in (*model, model):
            fully_shard(layer, mesh=mesh)
        if compress:
            compress_all_gather(model)
        found.append(steps(model, dist.get_rank() % 2, count=2))
    return found


def two_ways() -> nn.Sequential:
    """FSDP2 along one axis of a mesh and tensor parallelism along the other."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = nn.Sequential(*net())
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
    for layer in (*model, model):
        fully_shard(layer, mesh=mesh["dp"])
    return model


def compressed_two_ways(rank: int) -> None:
    compress_all_gather(two_ways())


def resharded_to_fewer(rank: int) -> None:
    compress_all_gather(sharded(net(), reshard_after_forward=2))


def uneven(rank: int) -> tuple[list[Tensor], str] | None:
    """11, 11 and 10 rows on three of the ranks: losses with whole gathers, and how compressed ones end."""
    three = dist.new_group([0, 1, 2])
    if rank == 3:
        return None
    mesh = DeviceMesh.from_group(three, "cpu")
    model = net()
    for layer in (*model, model):
        fully_shard(layer, mesh=mesh)
    end = ended(lambda rank: compress_all_gather(model, process_group=three), rank)
    return steps(model, 0)[:STEPS], end


def loaded(folder: str) -> Tensor:
    """What a model of as many shards as there are ranks computes with the checkpoint of others."""
    model = sharded(net())
    compress_all_gather(model)
    state = {"model": model.state_dict()}
    dcp.load(state, checkpoint_id=f"{folder}/checkpoint")
    model.load_state_dict(state["model"])
    return model(inputs(9)[0]).detach()


def worker(rank: int, world: int, folder: str) -> None:
    """Four ranks save, two load."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store{world}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=timedelta(seconds=120))
    try:
        seen: dict[str, object] = {}
        if world == FOUR:
            seen["replicated"] = [replicated(None), replicated(SparseConfig(precision="fp8"))]
            x = inputs(0)[0]
            seen["two ways"] = two_ways()(x).detach().clone(), net()(x).detach()
            seen["uneven"] = uneven(rank)
            seen["ended"] = [ended(attempt, rank) for attempt in (compressed_two_ways, resharded_to_fewer)]
            model = sharded(net())
            compress_all_gather(model)
            steps(model, rank % 2, count=1)
            dcp.save({"model": model.state_dict()}, checkpoint_id=f"{folder}/checkpoint")
            seen["output"] = model(inputs(9)[0]).detach()
            seen["mid-phase"] = checkpoints.saved(folder, rank)
        else:
            seen["output"] = loaded(folder)
            seen["mid-phase"] = checkpoints.resumed(folder, rank)
        torch.save(seen, Path(folder) / f"{rank}of{world}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()
