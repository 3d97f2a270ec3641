"""What a host may do to a model or its optimizer before we see them, and plans of each rank. For spawned workers."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from semisparse import Plan, SparseSchedule, recipes, sparsify
from semisparse._plan import planned, uses_of
from semisparse.errors import SemiSparseError
from semisparse.recipes import Recipe, RecipeSchedule
from tests.planning.simulated import SHARES, SimulatedTimer, measurer

RECIPES: list[Recipe] = [
    recipes.safest(),
    recipes.fastest(),
    recipes.dinov2(),
    recipes.sr_ste(),
    recipes.fst(refresh_every=2),
    recipes.s_ste(),
]


def dense() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32))


def measured(rank: int) -> tuple[nn.Sequential, Plan]:
    """The plan of a GPU on which fp8 is slow, on the second rank."""
    shares = SHARES | ({"fp8 + 2:4": 1.5, "dense fp8": 1.5} if rank else {})
    model = dense().to(torch.bfloat16)
    uses = uses_of(model, (torch.ones(16, 32, dtype=torch.bfloat16),), {}, None)
    return model, planned(uses, measurer(SimulatedTimer(shares)), None)


def plan_of_each_rank(rank: int) -> None:
    model, plan = measured(rank)
    plan.apply(model)
    SparseSchedule.sparse_then_dense(model, 10)


def plan_of_one_rank(rank: int) -> None:
    """As docs/plan.md has it."""
    model, plan = measured(rank)
    plans = [plan] if rank == 0 else [None]
    dist.broadcast_object_list(plans)
    plans[0].apply(model)
    SparseSchedule.sparse_then_dense(model, 10)


def trained(recipe: Recipe, rank: int, optimizer: Callable[[nn.Module], torch.optim.Optimizer]) -> list[Tensor]:
    model = dense()
    sparsify(model, recipe.config)
    model = DistributedDataParallel(model)
    stepped = optimizer(model)
    schedule, losses = RecipeSchedule(recipe, model, stepped, 4), []
    for step in range(4):
        x = torch.randn(8, 32, generator=torch.Generator().manual_seed(10 * step + rank))
        loss = (model(x) - x).square().mean()
        loss.backward()
        stepped.step()
        stepped.zero_grad()
        assert schedule.step()
        losses.append(loss.detach())
    return losses


def an_optimizer_of_shards(rank: int) -> None:
    """Each rank steps a part of the weights: with each recipe as one that steps all."""
    for recipe in RECIPES:
        whole = trained(recipe, rank, lambda model: torch.optim.AdamW(model.parameters(), lr=0.05))
        parts = trained(
            recipe, rank, lambda model: ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=0.05)
        )
        assert all(torch.equal(one, other) for one, other in zip(whole, parts, strict=True)), recipe.name


class Wrapped:
    """A host's wrapper that hides its optimizer from us."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.inside = [optimizer]

    def step(self) -> None:
        self.inside[0].step()


def started(optimizer: Callable[[torch.optim.Optimizer], Any]) -> None:
    model = dense()
    sparsify(model)
    inner = torch.optim.AdamW(model.parameters())
    RecipeSchedule(recipes.sr_ste(), DistributedDataParallel(model), optimizer(inner), 10)


def a_hidden_optimizer(rank: int) -> None:
    started(Wrapped)


def a_hidden_optimizer_on_one(rank: int) -> None:
    started(Wrapped if rank else lambda inner: inner)


def swapped_after_compiled_layers_were_sharded(rank: int) -> None:
    model = dense()
    for layer in (model[0], model[2]):
        layer.compile(backend="eager")
        fully_shard(layer)
    model(torch.ones(4, 32))
    sparsify(model)


def flat(model: nn.Module, use: Callable[[nn.Module], object], views: bool = False) -> None:
    """FSDP1 around model, which use refuses with the way out."""
    wrapped = FullyShardedDataParallel(model, use_orig_params=views, device_id=torch.device("cpu"))
    try:
        use(wrapped)
    except SemiSparseError as error:
        assert "FSDP2 (torch.distributed.fsdp.fully_shard)" in str(error)
        raise


def scheduled(model: nn.Module) -> None:
    SparseSchedule.sparse_then_dense(model, 10)


def flat_weights_scheduled(rank: int) -> None:
    model = dense()
    sparsify(model)
    flat(model, scheduled)


def views_of_flat_weights_scheduled(rank: int) -> None:
    model = dense()
    sparsify(model)
    flat(model, scheduled, views=True)


def flat_weights_swapped(rank: int) -> None:
    flat(dense(), sparsify)


MISMATCH, NONE = ("RankMismatchError", "RankMismatchError"), ("", "")
SCENARIOS: dict[Callable[[int], None], tuple[str, str]] = {
    plan_of_each_rank: MISMATCH,
    plan_of_one_rank: NONE,
    an_optimizer_of_shards: NONE,
    a_hidden_optimizer: ("ConfigError", "ConfigError"),
    a_hidden_optimizer_on_one: ("RankMismatchError", "ConfigError"),
    swapped_after_compiled_layers_were_sharded: ("NoLayerMatchedError", "NoLayerMatchedError"),
    flat_weights_scheduled: ("ScheduleError", "ScheduleError"),
    views_of_flat_weights_scheduled: ("ScheduleError", "ScheduleError"),
    flat_weights_swapped: ("NoLayerMatchedError", "NoLayerMatchedError"),
}
