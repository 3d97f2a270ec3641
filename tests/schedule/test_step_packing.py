"""pack="per_step": the training of pack="each_forward", bit for bit, packed once per applied step."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from semisparse import Phase, SparseConfig, SparseSchedule, recipes, sparsify
from semisparse.errors import ConfigError, ScheduleError
from semisparse.recipes import RecipeSchedule
from semisparse.testing import assert_bit_equal
from tests.recipes.training import RECIPES, optimizer_for
from tests.support import COPIES

pytestmark = pytest.mark.usefixtures("packed_on_cpu")
BF16 = torch.bfloat16
PHASES = [Phase("sparse", 4), Phase("dense", 2), Phase("sparse", 4)]


def network(config: SparseConfig | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)).to(BF16)
    sparsify(model, config)
    return model


def x_of(step: int) -> Tensor:
    return torch.randn(8, 16, generator=torch.Generator().manual_seed(step)).to(BF16)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=False),
    "foreach AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    "fused AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_training_is_that_of_packing_at_each_forward_bit_for_bit(kind: str, launches: list[int]) -> None:
    losses: dict[str, list[Tensor]] = {"each_forward": [], "per_step": []}
    for pack in losses:
        model = network()
        schedule = SparseSchedule(model, PHASES, pack=pack)
        optimizer = OPTIMIZERS[kind](model.parameters())
        for step in range(10):
            for part in range(2):
                loss = model(x_of(2 * step + part)).float().square().mean()
                loss.backward()
                losses[pack].append(loss.detach())
                if part:
                    optimizer.step()
                    optimizer.zero_grad()
                schedule.step()
    assert_bit_equal(torch.stack(losses["per_step"]), torch.stack(losses["each_forward"]))
    # After the steps 1 to 3, where the second sparse phase begins, and after its steps.
    assert launches == [2] * (3 + 1 + 4)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_train_as_with_packing_at_each_forward(name: str, launches: list[int]) -> None:
    found: dict[str, list[Tensor]] = {}
    for pack in ("each_forward", "per_step"):
        torch.manual_seed(0)
        recipe = RECIPES[name]()
        model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)).to(BF16)
        sparsify(model, recipe.config)
        optimizer = optimizer_for(recipe, model)
        schedule = RecipeSchedule(recipe, model, optimizer, 24, pack=pack)
        found[pack] = []
        for step in range(24):
            optimizer.zero_grad()
            loss = model(x_of(step)).float().square().mean()
            loss.backward()
            optimizer.step()
            schedule.step()
            found[pack].append(loss.detach())
        schedule.finish()
        found[pack] += [parameter.detach().float().sum() for parameter in model.parameters()]
        assert schedule.packed_weights is None
        assert all(layer._packed is None for layer in (model[0], model[2]))
    assert launches
    assert_bit_equal(torch.stack(found["per_step"]), torch.stack(found["each_forward"]))


@pytest.mark.parametrize("pack", ["per-step", True, None, 1])
def test_a_wrong_value_is_refused_and_changes_nothing(pack: object) -> None:
    model = network()
    recipe, optimizer = recipes.dinov2(), torch.optim.SGD(model.parameters(), lr=0.1)
    for start in (
        lambda: SparseSchedule(model, PHASES, pack=pack),
        lambda: SparseSchedule.sparse_then_dense(model, 4, pack=pack),
        lambda: SparseSchedule.dense_sparse_dense(model, 4, 0.25, 0.5, pack=pack),
        lambda: RecipeSchedule(recipe, model, optimizer, 4, pack=pack),
    ):
        with pytest.raises(ConfigError, match=r"pack=.* is not one of 'each_forward', 'per_step'"):
            start()
    assert all("sparse_enabled" not in vars(layer) for layer in (model[0], model[2]))


def test_by_default_nothing_is_held(launches: list[int]) -> None:
    model = network()
    schedule = SparseSchedule(model, PHASES)
    schedule.refresh()
    schedule.trust_calls()
    assert schedule.packed_weights is None and not launches
    assert "packs per step" not in repr(schedule)


def test_in_a_dense_phase_nothing_is_held() -> None:
    model = network()
    schedule = SparseSchedule.dense_sparse_dense(model, 4, 0.25, 0.5, pack="per_step")
    schedule.trust_calls()
    held = []
    for _ in range(4):
        held.append(schedule.packed_weights.layers)
        with torch.no_grad():
            model[0].weight.neg_()
        assert schedule.step()
    assert held == [0, 2, 2, 0]
    assert "packs per step" in repr(schedule)


def test_skipped_steps_pack_nothing_that_did_not_change(launches: list[int]) -> None:
    model = network()
    schedule = SparseSchedule(model, [Phase("sparse", 9)], pack="per_step")
    schedule.trust_calls()
    launches.clear()
    assert not schedule.step(skipped=True)
    assert launches == []
    with torch.no_grad():
        model[0].weight.neg_()
    assert not schedule.step(skipped=True)
    assert launches == [1]


@pytest.mark.parametrize("fused", [True, False])
def test_under_a_scaler(fused: bool) -> None:
    losses: dict[str, list[Tensor]] = {"each_forward": [], "per_step": []}
    for pack in losses:
        torch.manual_seed(0)
        model = network().float()
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
        schedule = SparseSchedule(model, [Phase("sparse", 9)], pack=pack)
        for step in range(8):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16):
                loss = model(x_of(step).float()).float().square().mean() * (float("inf") if step in (1, 4) else 1.0)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            assert schedule.step(scaler) is (step not in (1, 4))
            losses[pack].append(loss.detach())
    assert schedule.packed_weights.layers == 2
    assert_bit_equal(torch.stack(losses["per_step"]), torch.stack(losses["each_forward"]))


def test_a_resumed_run_packs_what_was_loaded_and_goes_on_bit_for_bit() -> None:
    def run(model: nn.Module, schedule: SparseSchedule, optimizer: torch.optim.Optimizer, steps: range) -> list[Tensor]:
        found = []
        for step in steps:
            optimizer.zero_grad()
            loss = call(x_of(step)).float().square().mean()
            loss.backward()
            optimizer.step()
            schedule.step()
            found.append(loss.detach())
        return found

    def start() -> tuple[nn.Module, SparseSchedule, torch.optim.Optimizer]:
        model = network()
        schedule = SparseSchedule(model, PHASES, pack="per_step")
        return model, schedule, torch.optim.AdamW(model.parameters(), lr=0.1)

    first = start()
    call = first[0]
    run(*first, range(3))
    state = copy.deepcopy([part.state_dict() for part in first])
    assert not any("pack" in key for key in state[1])
    expected = run(*first, range(3, 8))
    second = start()
    second[1].trust_calls()
    call = torch.compile(second[0], backend="aot_eager")
    call(x_of(0))
    for part, saved in zip(second, (state[0], state[1], state[2]), strict=True):
        part.load_state_dict(saved)
    assert_bit_equal(torch.stack(run(*second, range(3, 8))), torch.stack(expected))
    torch._dynamo.reset()


def test_refresh_packs_what_leaves_no_trace() -> None:
    model = network().requires_grad_(False)
    schedule = SparseSchedule(model, PHASES, pack="per_step")
    schedule.trust_calls()
    before = model(x_of(0))
    model[0].weight.data.mul_(-2)
    fresh = copy.deepcopy(model)
    assert_bit_equal(model(x_of(0)), before)
    schedule.refresh()
    assert_bit_equal(model(x_of(0)), fresh(x_of(0)))
    assert not torch.equal(fresh(x_of(0)), before)


class Bypass(nn.Module):
    """`proj` is read through a list, which no source shows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.proj = nn.Linear(16, 16), nn.Linear(16, 16)
        self.hidden = [self.proj]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.first(x), self.hidden[0].weight)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_bypassed_layer_still_stops_the_first_step(compiled: bool) -> None:
    model = Bypass().to(BF16)
    sparsify(model)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = SparseSchedule(model, PHASES, pack="per_step")
    call = torch.compile(model, backend="aot_eager") if compiled else model
    call(x_of(0)).float().sum().backward()
    optimizer.step()
    with pytest.raises(ScheduleError, match=r"^proj: swapped, but not called"):
        schedule.step()
    torch._dynamo.reset()


@pytest.mark.parametrize("how", COPIES)
def test_a_copied_schedule_packs_the_copied_model(how: str) -> None:
    model = network()
    schedule = SparseSchedule(model, PHASES, pack="per_step")
    schedule.trust_calls()
    other, theirs = COPIES[how]((model, schedule))
    assert theirs.packed_weights.layers == 0 and schedule.packed_weights.layers == 2
    theirs.trust_calls()
    with torch.no_grad():
        other[0].weight.neg_()
    assert theirs.step() and theirs.packed_weights.layers == 2
    fresh = copy.deepcopy(other)
    assert_bit_equal(other(x_of(0)), fresh(x_of(0)))
    assert not torch.equal(model(x_of(0)), other(x_of(0)))


def test_averages_that_follow_pack_at_each_forward() -> None:
    model = network()
    schedule = SparseSchedule(model, PHASES, pack="per_step")
    schedule.trust_calls()
    average = torch.optim.swa_utils.AveragedModel(model)
    schedule.follow(average)
    with torch.no_grad():
        model[0].weight.neg_()
    average.update_parameters(model)
    schedule.step()
    assert average.module[0]._packed is None and schedule.packed_weights.layers == 2
    fresh = copy.deepcopy(average)
    assert_bit_equal(average(x_of(0)), fresh(x_of(0)))


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore::UserWarning:torch")
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_under_data_parallel_wrappers(one_rank: None, wrapper: str) -> None:
    losses: dict[str, list[Tensor]] = {"each_forward": [], "per_step": []}
    for pack in losses:
        model = network()
        schedule = SparseSchedule(model, PHASES, pack=pack)
        call = DistributedDataParallel(model) if wrapper == "ddp" else fully_shard(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        for step in range(10):
            optimizer.zero_grad()
            loss = call(x_of(step)).float().square().mean()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses[pack].append(loss.detach())
    assert schedule.packed_weights.layers == (2 if wrapper == "ddp" else 0)
    assert set(schedule.packed_weights.fallbacks) == (set() if wrapper == "ddp" else {"0", "2"})
    assert_bit_equal(torch.stack(losses["per_step"]), torch.stack(losses["each_forward"]))
