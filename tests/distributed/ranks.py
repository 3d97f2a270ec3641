"""What two ranks hold when they disagree; imported by spawned workers. Each scenario ends in an error name per rank."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from semisparse import LossGuard, SparseConfig, SparseSchedule, recipes, sparsify
from semisparse.errors import SemiSparseError
from semisparse.recipes import Recipe, RecipeSchedule
from semisparse.sampling import layer_seed
from tests.distributed import host_ranks
from tests.distributed.host_ranks import MISMATCH, NONE

WORLD = 2


def net(seed: int, recipe: Recipe | None = None, config: SparseConfig | None = None) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16))
    sparsify(model, recipe.config if recipe else config)
    return model


def started(recipe: Recipe, model: nn.Module, **settings) -> RecipeSchedule:
    return RecipeSchedule(recipe, model, torch.optim.SGD(model.parameters(), lr=0.1), 20, **settings)


def held_masks(rank: int) -> None:
    started(recipes.fst(refresh_every=3), net(rank, recipes.fst()))


def scales(rank: int) -> None:
    started(recipes.s_ste(), net(rank, recipes.s_ste()))


def after_wrapping(rank: int) -> None:
    for recipe in (recipes.fst(refresh_every=3), recipes.s_ste()):
        started(recipe, DistributedDataParallel(net(rank, recipe)))


def same_seed(rank: int) -> None:
    started(recipes.fst(refresh_every=3), net(0, recipes.fst()))


def other_weights_without_held_masks(rank: int) -> None:
    started(recipes.dinov2(), net(rank))  # masks follow the weights, which DDP makes equal
    SparseSchedule.sparse_then_dense(net(rank), 10)


def other_config(rank: int) -> None:
    SparseSchedule.sparse_then_dense(net(0, config=SparseConfig(weight="row" if rank else "transposable")), 10)


def other_layers(rank: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    sparsify(model, select="1" if rank else "0")
    SparseSchedule.sparse_then_dense(model, 10)


def nothing_swapped_on_one(rank: int) -> None:
    SparseSchedule.sparse_then_dense(nn.Sequential(nn.Linear(16, 16)) if rank else net(0), 10)


def nothing_swapped_anywhere(rank: int) -> None:
    SparseSchedule.sparse_then_dense(nn.Sequential(nn.Linear(16, 16)), 10)


def one_recipe_fails(rank: int) -> None:
    model = net(0, recipes.fst())
    optimizer = torch.optim.SGD([*model.parameters()][1 if rank else 0 :], lr=0.1)
    RecipeSchedule(recipes.fst(), model, optimizer, 20)


def other_recipe_settings(rank: int) -> None:
    started(recipes.fst(refresh_every=3 + rank), net(0, recipes.fst()))


def nothing_compared(rank: int) -> None:
    started(recipes.fst(refresh_every=3), net(rank, recipes.fst()), process_group=False)


def a_group_of_one(rank: int) -> None:
    groups = [dist.new_group([other]) for other in range(WORLD)]
    started(recipes.fst(refresh_every=3), net(rank, recipes.fst()), process_group=groups[rank])


def apart_at_a_refresh(rank: int) -> None:
    recipe = recipes.fst(refresh_every=3, decay=0.0, grad_output=None)  # nothing averages what ranks would sample
    model = net(0, recipe)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = RecipeSchedule(recipe, model, optimizer, 20)
    for step in range(4):
        if step == 1 and rank:  # what a broken all-reduce would do
            with torch.no_grad():
                model[0].weight.copy_(model[0].weight.flip(0))
        optimizer.zero_grad()
        model(torch.ones(4, 16)).sum().backward()
        optimizer.step()
        try:
            schedule.step()
        except SemiSparseError:
            assert step == 2  # the third applied step
            raise


def seeds(rank: int) -> None:
    """Each rank of the data-parallel group has keys of its own; DistributedDataParallel averages what they sample."""
    config = SparseConfig(grad_output="mvue")
    model = DistributedDataParallel(net(0, config=config))
    SparseSchedule.sparse_then_dense(model, 10, seed=7)
    assert int(model.module[2].held_seed) == layer_seed(7, "2", rank, 0)
    generator = torch.Generator().manual_seed(rank)
    model(torch.randn(8, 16, generator=generator)).square().sum().backward()
    gradients = [torch.empty(16, 16) for _ in range(WORLD)]
    dist.all_gather(gradients, model.module[2].weight.grad)
    assert torch.equal(*gradients)
    groups = [dist.new_group([other]) for other in range(WORLD)]
    alone = net(0, config=config)
    SparseSchedule.sparse_then_dense(alone, 10, seed=7, process_group=groups[rank])
    assert int(alone[2].held_seed) == layer_seed(7, "2", 0, 0)


def other_seed_on_one(rank: int) -> None:
    SparseSchedule.sparse_then_dense(net(0), 10, seed=rank)


class Experts(nn.Module):
    """Each rank calls one of two experts; DistributedDataParallel gives both their gradients."""

    def __init__(self, bypassed: bool) -> None:
        super().__init__()
        self.first, self.experts = nn.Linear(16, 16), nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)])
        self.bypassed = bypassed

    def forward(self, x: Tensor, chosen: int) -> Tensor:
        layer = [*self.experts][chosen]
        return F.linear(self.first(x), layer.weight, layer.bias) if self.bypassed else layer(self.first(x))


def train_experts(rank: int, bypassed: bool) -> None:
    torch.manual_seed(0)
    model = Experts(bypassed)
    sparsify(model)
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    schedule = SparseSchedule.sparse_then_dense(wrapped, 10)
    for _ in range(2):
        optimizer.zero_grad()
        wrapped(torch.ones(4, 16), rank).sum().backward()
        optimizer.step()
        schedule.step()


def experts_called_elsewhere(rank: int) -> None:
    train_experts(rank, bypassed=False)


def experts_bypassed(rank: int) -> None:
    train_experts(rank, bypassed=True)


def other_phases(rank: int) -> None:
    SparseSchedule.sparse_then_dense(net(0), 10 if rank else 20)


def a_bad_fraction_on_one(rank: int) -> None:
    SparseSchedule.sparse_then_dense(net(0), 10, 2.0 if rank else 0.5)


def replaced_on_one(rank: int) -> None:
    """One rank raises at its first step, and the other must not wait for it."""
    model = net(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = SparseSchedule.sparse_then_dense(model, 10)
    if rank:
        model[0] = nn.Linear(16, 16)
    model(torch.ones(4, 16)).sum().backward()
    optimizer.step()
    schedule.step()


def guarded(rank: int) -> None:
    """The loss of one rank alone diverges: both become dense at the same step, on the mean."""
    schedule = SparseSchedule.sparse_then_dense(net(0), 100)
    guard = LossGuard(schedule, smoothing=4, interval=2, patience=2)
    for step in range(1, 61):
        schedule.resume_at(step)
        tripped = guard.update(torch.tensor(2.0 + (rank and max(0, step - 20))))
        ended = [torch.zeros(1) for _ in range(WORLD)]
        dist.all_gather(ended, torch.tensor([float(tripped)]))
        assert torch.equal(*ended)
    assert schedule.ended_at == guard.report().tripped_at is not None
    assert guard.report().not_finite == 0


def resumed_elsewhere(rank: int) -> None:
    """One rank is in a sparse phase and one in a dense one: only the first would compare which layers are called."""
    model = net(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = SparseSchedule.sparse_then_dense(model, 10)
    schedule.resume_at(8 * rank)
    model(torch.ones(4, 16)).sum().backward()
    optimizer.step()
    schedule.step()


def ended_on_one(rank: int) -> None:
    """The ranks are at different steps."""
    schedule = SparseSchedule.sparse_then_dense(net(0), 10)
    schedule.resume_at(rank)
    schedule.end_sparse_phase()


SCENARIOS: dict[Callable[[int], None], tuple[str, str]] = {
    held_masks: MISMATCH,
    scales: MISMATCH,
    seeds: NONE,
    other_seed_on_one: MISMATCH,
    after_wrapping: NONE,
    same_seed: NONE,
    other_weights_without_held_masks: NONE,
    other_config: MISMATCH,
    other_layers: MISMATCH,
    nothing_swapped_on_one: ("RankMismatchError", "NoLayerMatchedError"),
    nothing_swapped_anywhere: ("NoLayerMatchedError", "NoLayerMatchedError"),
    one_recipe_fails: ("RankMismatchError", "ConfigError"),
    other_recipe_settings: MISMATCH,
    nothing_compared: NONE,
    a_group_of_one: NONE,
    apart_at_a_refresh: MISMATCH,
    other_phases: MISMATCH,
    a_bad_fraction_on_one: ("RankMismatchError", "ScheduleError"),
    replaced_on_one: ("RankMismatchError", "ScheduleError"),
    guarded: NONE,
    ended_on_one: MISMATCH,
    resumed_elsewhere: MISMATCH,
    experts_called_elsewhere: NONE,
    experts_bypassed: ("ScheduleError", "ScheduleError"),
}
SCENARIOS |= host_ranks.SCENARIOS


def worker(rank: int, folder: str) -> None:
    """Run all scenarios, one after the other, and write the name of the error that each ended in."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD, timeout=timedelta(seconds=20)
    )
    ended = {}
    for scenario in SCENARIOS:
        try:
            scenario(rank)
            ended[scenario.__name__] = ""
        except SemiSparseError as error:
            ended[scenario.__name__] = type(error).__name__
        dist.barrier()
    torch.save(ended, Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()
