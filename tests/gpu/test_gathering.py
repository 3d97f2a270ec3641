"""On two GPUs: compressed all-gathers of FSDP2 over NCCL train as whole ones do, bit for bit."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from semisparse import Phase, SparseConfig, SparseSchedule, sparsify
from semisparse.integrations.fsdp import compress_all_gather
from tests.gpu.two import WORLD, on_two_gpus

pytestmark = pytest.mark.gpu

CONFIGS = {
    "transposable": SparseConfig(),
    "repack": SparseConfig(repack=True),
    "row": SparseConfig(weight="row"),
    "mvue": SparseConfig(grad_output="mvue"),
    "fp8": SparseConfig(precision="fp8"),
}


def trained(config: SparseConfig, rank: int, compress: bool) -> list[torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256)).to(rank, torch.bfloat16)
    sparsify(model, config)
    for layer in (model[0], model[2]):
        fully_shard(layer)
    fully_shard(model)
    if compress:
        compress_all_gather(model)
    schedule = SparseSchedule(model, [Phase("sparse", 3), Phase("dense", 1), Phase("sparse", 2)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(rank)
    found = []
    for _ in range(6):
        x = torch.randn(128, 256, generator=generator).to(rank, torch.bfloat16)
        loss = (model(x) - x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        found.append(loss.detach().cpu())
    return found + [parameter.full_tensor().detach().cpu() for parameter in model.parameters()]


def finite(value: float, rank: int) -> bool:
    """Whether any output is finite, in fp8 with value in the second rank's shard."""
    model = nn.Sequential(nn.Linear(64, 64, bias=False)).to(rank, torch.bfloat16)
    with torch.no_grad():
        model[0].weight[40, 3] = value
    sparsify(model, SparseConfig(precision="fp8"))
    compress_all_gather(fully_shard(model))
    return bool(model(torch.ones(16, 64, device=rank, dtype=torch.bfloat16)).isfinite().any())


def worker(rank: int, folder: str) -> None:
    torch.cuda.set_device(rank)
    torch.use_deterministic_algorithms(True)  # nothing is timed, so that both runs use the same products
    dist.init_process_group("nccl", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    try:
        found = {
            name: [trained(config, rank, compress) for compress in (True, False)] for name, config in CONFIGS.items()
        }
        found["finite"] = [finite(value, rank) for value in (float("nan"), float("inf"), 1.0)]
        torch.save(found, Path(folder) / f"rank{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return on_two_gpus(worker, tmp_path_factory.mktemp("nccl"))


@pytest.mark.parametrize("name", CONFIGS)
def test_training_is_that_of_whole_gathers_bit_for_bit(records: list[dict], name: str) -> None:
    for record in records:
        compressed, whole = record[name]
        assert len(compressed) == len(whole) == 10
        for one, other in zip(compressed, whole, strict=True):
            assert torch.equal(one, other)


def test_what_is_not_finite_on_one_gpu_shows_on_both(records: list[dict]) -> None:
    for record in records:
        assert record["finite"] == [False, False, True]
