"""Two stages of a pipeline, each with a schedule of its own, and the same training in one process."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from semisparse import Phase, SparseConfig, SparseSchedule, sparsify
from semisparse.errors import RankMismatchError

MICRO_BATCHES, STEPS = 2, 3
ORDERS = {"GPipe": ScheduleGPipe, "1F1B": Schedule1F1B}
CONFIGS = {"fp64": (torch.float64, None), "fp8": (torch.float32, SparseConfig(precision="fp8"))}


def network(name: str) -> nn.Sequential:
    """Equal in every process, swapped."""
    dtype, config = CONFIGS[name]
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 32)).to(dtype)
    sparsify(model, config)
    return model


def tools(part: nn.Module) -> tuple[SparseSchedule, torch.optim.Optimizer]:
    """What trains a model or a stage. Stages hold different layers, so there is nothing to compare."""
    schedule = SparseSchedule(part, [Phase("sparse", 2), Phase("dense", 1)], process_group=False)
    return schedule, torch.optim.AdamW(part.parameters(), lr=0.05)


def batch(step: int, name: str) -> Tensor:
    return torch.randn(16, 32, generator=torch.Generator().manual_seed(step)).to(CONFIGS[name][0])


def loss_of(y: Tensor, target: Tensor) -> Tensor:
    return (y - target).square().mean()


def staged(rank: int, order: str, name: str) -> tuple[list[Tensor], list[Tensor]]:
    """Losses, which the last stage knows, and the weights of this stage."""
    model = network(name)
    part = model[2:] if rank else model[:2]
    schedule, optimizer = tools(part)
    stage = PipelineStage(part, rank, 2, torch.device("cpu"))
    run = ORDERS[order](stage, MICRO_BATCHES, loss_fn=loss_of)
    losses: list[Tensor] = []
    for step in range(STEPS):
        x, seen = batch(step, name), []
        run.step(target=x, losses=seen) if rank else run.step(x)
        losses += [loss.detach() for loss in seen]
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return losses, [weight.detach() for weight in part.parameters()]


def alone(name: str) -> tuple[list[Tensor], list[list[Tensor]]]:
    """The same in one process: losses, and the weights of each stage."""
    model, losses = network(name), []
    schedule, optimizer = tools(model)
    for step in range(STEPS):
        for x in batch(step, name).chunk(MICRO_BATCHES):
            loss = loss_of(model(x), x)
            (loss / MICRO_BATCHES).backward()
            losses.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return losses, [[weight.detach() for weight in part.parameters()] for part in (model[:2], model[2:])]


def compared(rank: int) -> str:
    """The message of a schedule that compares the layers of both stages."""
    model = network("fp64")
    try:
        SparseSchedule(model[2:] if rank else model[:2], [Phase("sparse", 1)])
    except RankMismatchError as error:
        return str(error)
    return ""


def checks() -> dict[str, object]:
    """Everything, in one of two processes."""
    rank = dist.get_rank()
    found: dict[str, object] = {f"{order} {name}": staged(rank, order, name) for order in ORDERS for name in CONFIGS}
    return found | {"compared": compared(rank)}
