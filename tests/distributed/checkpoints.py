"""Checkpoints of FSDP2 in mid-phase, full state dicts, and a step that one shard makes a scaler skip. For workers."""

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)

from semisparse import SparseSchedule
from tests.distributed import training
from tests.distributed.training import STEPS, Scenario

SCENARIO = Scenario("fsdp_layers", "weight", "adamw")
SAVED_AFTER = 3  # the second of three sparse steps has been taken

Run = tuple[nn.Module, torch.optim.Optimizer, SparseSchedule]


def run(rank: int) -> Run:
    model, schedule = training.build(SCENARIO, rank)
    return model, training.optimizer_for(SCENARIO, model), schedule


def trained(run: Run, rank: int, steps: range) -> list[Tensor]:
    """Losses of steps, each followed by its phase."""
    model, optimizer, schedule = run
    found = []
    for step in steps:
        x, target = training.shards(SCENARIO, step)[rank % training.WORLD]
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        found += [loss.detach(), torch.tensor(float(schedule.phase == "sparse"))]
    return found


def saved(folder: str, rank: int) -> list[Tensor]:
    """Train, save in mid-phase, and train on: what came after."""
    model, optimizer, schedule = whole = run(rank)
    trained(whole, rank, range(SAVED_AFTER))
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments, "schedule": schedule}, checkpoint_id=f"{folder}/mid-phase")
    return trained(whole, rank, range(SAVED_AFTER, STEPS))


def resumed(folder: str, rank: int) -> list[Tensor]:
    """What comes after in a run that loads the checkpoint into other weights."""
    model, optimizer, schedule = whole = run(rank)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-1)
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments, "schedule": schedule}
    dcp.load(state, checkpoint_id=f"{folder}/mid-phase")
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    assert schedule.applied_steps == SAVED_AFTER
    return trained(whole, rank, range(SAVED_AFTER, STEPS))


def full_state(rank: int) -> tuple[bool, bool]:
    """Whether a full state dict in a sparse phase is that of the dense model, and on the first rank alone."""
    model, _, _ = whole = run(rank)
    trained(whole, rank, range(SAVED_AFTER))
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options)
    plain = training.dense(SCENARIO)
    weights = [training.whole(parameter) for parameter in model.parameters()]
    if rank == 0:
        plain.load_state_dict(state)
    same = all(torch.equal(one, other) for one, other in zip(plain.parameters(), weights, strict=True))
    return same, not state


def overflow_in_one_shard(rank: int) -> list[int]:
    """Applied steps after each of three, of which the second has an Inf in the gradient of one rank's shard."""
    model, optimizer, schedule = run(rank)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    counted = []
    for step in range(3):
        x, target = training.shards(SCENARIO, step)[rank]
        scaler.scale((model(x) - target).square().mean()).backward()
        if step == 1 and rank == 1:
            model[0].weight.grad._local_tensor[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        schedule.step(scaler)
        counted.append(schedule.applied_steps)
    return counted


def checks(folder: str) -> dict[str, object]:
    """Everything, in one of two processes."""
    rank = dist.get_rank()
    return {
        "saved": saved(folder, rank),
        "resumed": resumed(folder, rank),
        "full state": full_state(rank),
        "overflow": overflow_in_one_shard(rank),
    }
