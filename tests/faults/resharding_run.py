"""What each rank does in tests/faults/resharding.py, and one process beside them."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from semisparse import SparseSchedule, sparsify
from semisparse.integrations.fsdp import compress_all_gather
from semisparse.recipes import Recipe, RecipeSchedule, StepAdamW
from tests.distributed.training import RecordMasks, whole
from tests.faults.resharding import PHASES, STAGES, STEPS, Way
from tests.faults.training import digest

TOKENS = 48
FEATURES, EVEN = (16, 20, 28, 6), (16, 48, 96, 6)
"""EVEN for compressed gathers, which refuse shards without whole tiles."""


def distributed(way: Way, model: nn.Sequential) -> nn.Module:
    """The swapped model on the ranks."""
    if way.distribute == "ddp":
        return DistributedDataParallel(model)
    for layer in (model[0], model[2], model[4]) if way.distribute != "root" else ():
        fully_shard(layer)
    fully_shard(model)
    if way.distribute == "compressed":
        compress_all_gather(model)
    return model


class Run:
    """Model, optimizer and schedule at the start.

    Args:
        way: How.
        seed: Of weights and data.
        alone: Whether in one process.
    """

    def __init__(self, way: Way, seed: int, alone: bool) -> None:
        torch.manual_seed(seed)
        self.features = first, second, third, last = EVEN if way.distribute == "compressed" else FEATURES
        plain = nn.Sequential(
            nn.Linear(first, second), nn.GELU(), nn.Linear(second, third), nn.GELU(), nn.Linear(third, last)
        ).double()
        recipe = way.made if isinstance(way.made, Recipe) else None
        sparsify(plain, recipe.config if recipe else way.made, exclude="4")
        self.inner: nn.Sequential = plain
        self.model = plain if alone else distributed(way, plain)
        self.optimizer = self._optimizer(way)
        self.schedule: Any
        if recipe is None:
            self.schedule = SparseSchedule(self.model, PHASES)
        else:
            self.schedule = RecipeSchedule(recipe, self.model, self.optimizer, STEPS)
        self.seed = seed

    def _optimizer(self, way: Way) -> torch.optim.Optimizer:
        if isinstance(way.made, Recipe) and way.made.dense_range is not None:
            return StepAdamW(self.model.parameters(), lr=0.005, betas=(0.9, 0.9))
        if way.adamw:
            return torch.optim.AdamW(self.model.parameters(), lr=0.02)
        return torch.optim.SGD(self.model.parameters(), lr=0.2, momentum=0.9)

    def step(self, number: int, rank: int, world: int) -> tuple[float, list[Tensor]]:
        """The loss of the whole batch, and what this forward's masks were; then one optimizer step."""
        generator = torch.Generator().manual_seed(1000 * self.seed + number)
        x = torch.randn(TOKENS, self.features[0], generator=generator, dtype=torch.float64)
        target = torch.randn(TOKENS, self.features[-1], generator=generator, dtype=torch.float64)
        mine = slice(TOKENS // world * rank, TOKENS // world * (rank + 1))
        self.optimizer.zero_grad()
        with RecordMasks() as seen:
            loss = (self.model(x[mine]) - target[mine]).square().mean()
            loss.backward()
        held = [layer.held_codes.clone() for layer in self.inner if getattr(layer, "held_codes", None) is not None]
        self.optimizer.step()
        self.schedule.step()
        value = loss.detach()
        if world > 1:
            dist.all_reduce(value)
        return float(value) / world, [*seen.masks, *held]

    def weights(self) -> list[Tensor]:
        """Whole ones."""
        return [whole(parameter).detach().clone() for parameter in self.model.parameters()]

    def bits(self) -> str:
        """A digest of all that the next step depends on, whole and without names of wrappers."""
        state = [
            {name: whole(value) if isinstance(value, Tensor) else value for name, value in sorted(found.items())}
            for found in (self.optimizer.state[parameter] for parameter in self.model.parameters())
        ]
        groups = [{**group, "params": len(group["params"])} for group in self.optimizer.param_groups]
        return digest([self.weights(), state, groups, self.schedule.state_dict()])

    def parts(self) -> dict[str, Any]:
        """What a distributed checkpoint holds."""
        weights, moments = get_state_dict(self.model, self.optimizer)
        return {"model": weights, "optimizer": moments, "schedule": self.schedule}

    def load(self, folder: str) -> None:
        """Continue where a checkpoint was saved."""
        state = self.parts()
        dcp.load(state, checkpoint_id=folder)
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def stage(way: Way, seed: int, number: int, rank: int, odd: bool, now: Path) -> None:
    """One stage on each rank: load what the one before saved, train, save; writes what was seen beside it."""
    world, begin, end = STAGES[number]
    assert dist.get_world_size() == world
    run, root = Run(way, seed + number, alone=False), now.parents[1]
    run.seed, loaded = seed, ""
    if number:
        run.load(str(root / f"checkpoint{number - 1}"))
        loaded = run.bits()
    assert run.schedule.applied_steps == begin
    seen = [run.step(step, rank, world) for step in range(begin, end)]
    dcp.save(run.parts(), checkpoint_id=str(root / f"checkpoint{number}"))
    torch.save(
        {"losses": [loss for loss, _ in seen], "masks": [masks for _, masks in seen], "weights": run.weights(),
         "loaded": loaded, "saved": run.bits(), "phase": run.schedule.phase},
        root / f"seen{number}of{rank}.pt",
    )  # fmt: skip
