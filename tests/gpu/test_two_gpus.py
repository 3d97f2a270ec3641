"""On two GPUs: DDP and FSDP2 over NCCL choose the masks of one GPU, and train to its losses."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from semisparse import Phase, SparseConfig, SparseSchedule, sparsify
from tests.gpu.two import WORLD, on_two_gpus

pytestmark = pytest.mark.gpu

STEPS, TOKENS = 5, 128
CONFIGS = {"transposable": SparseConfig(), "row": SparseConfig(weight="row"), "fp8": SparseConfig(precision="fp8")}
LAYOUTS = ("ddp", "fsdp")
PHASES = [Phase("sparse", 3), Phase("dense", 1), Phase("sparse", 1)]


def network(config: SparseConfig, device: torch.device) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256)).bfloat16().to(device)
    sparsify(model, config)
    return model


def masks(model: nn.Sequential) -> list[Tensor]:
    """Of both layers, as whole weights give them."""
    found = []
    for layer in (model[0], model[2]):
        if isinstance(layer, FSDPModule):
            layer.unshard()
        found.append((layer.pruned_weight() != 0).cpu())
        if isinstance(layer, FSDPModule):
            layer.reshard()
    return found


def batch(step: int, rank: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(WORLD * step + rank)
    return torch.randn(TOKENS, 256, generator=generator).to(device, torch.bfloat16)


def trained(config: SparseConfig, layout: str | None, ranks: range, device: torch.device) -> dict[str, list[Tensor]]:
    """Masks before the first step, and the losses of ranks; layout=None for one GPU."""
    model = whole = network(config, device)
    if layout == "fsdp":
        for layer in (model[0], model[2], model):
            fully_shard(layer)
    first = masks(model)
    if layout == "ddp":
        whole = DistributedDataParallel(model)
    schedule = SparseSchedule(whole, PHASES)
    optimizer = torch.optim.AdamW(whole.parameters(), lr=0.01)
    losses = []
    for step in range(STEPS):
        for rank in ranks:
            x = batch(step, rank, device)
            loss = (whole(x) - x).float().square().mean()
            (loss / len(ranks)).backward()
            losses.append(loss.detach().cpu())
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return {"masks": first, "losses": losses}


def worker(rank: int, folder: str, kind: str) -> None:
    torch.use_deterministic_algorithms(True)  # nothing is timed, so that all processes use the same products
    device = torch.device(kind, rank if kind == "cuda" else None)
    if kind == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if kind == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    try:
        found = {
            f"{layout} {name}": trained(config, layout, range(rank, rank + 1), device)
            for layout in LAYOUTS
            for name, config in CONFIGS.items()
        }
        torch.save(found, Path(folder) / f"rank{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return on_two_gpus(worker, tmp_path_factory.mktemp("two"), "cuda")


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_masks_are_those_of_one_gpu_and_losses_too(records: list[dict], layout: str, name: str) -> None:
    alone = trained(CONFIGS[name], None, range(WORLD), torch.device("cuda", 0))
    for rank, record in enumerate(records):
        ours = record[f"{layout} {name}"]
        assert all(torch.equal(one, other) for one, other in zip(ours["masks"], alone["masks"], strict=True))
        expected = alone["losses"][rank::WORLD]
        assert len(ours["losses"]) == len(expected) == STEPS
        # Weights are rounded to bf16 after each step, and a mask may change with a last bit.
        torch.testing.assert_close(torch.stack(ours["losses"]).bfloat16(), torch.stack(expected).bfloat16())
