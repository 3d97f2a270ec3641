"""What may happen to scheduled layers behind the schedule's back: bypassed, replaced, computed, copied."""

import copy
import gc
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from semisparse import MaskMetrics, Phase, SparseConfig, SparseSchedule, densify, recipes, sparsify
from semisparse.errors import ConfigError, NoLayerMatched, ScheduleError
from semisparse.recipes import RecipeSchedule


class Bypass(nn.Module):
    """`proj` is read through a list, which no source shows; `spare` is not used at all."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.proj, self.spare = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.hidden = [self.proj]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.first(x), self.hidden[0].weight)


def net() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
    sparsify(model)
    return model


def train(model: nn.Module, optimizer: torch.optim.Optimizer, call=None) -> None:
    optimizer.zero_grad()
    (model if call is None else call)(torch.randn(4, 16)).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("zeroed", [True, False])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_bypassed_layer_stops_the_first_step(fused: bool, zeroed: bool, compiled: bool) -> None:
    model = Bypass()
    sparsify(model, exclude="spare")
    optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
    schedule = SparseSchedule.sparse_then_dense(model, 4)
    train(model, optimizer, torch.compile(model, backend="aot_eager") if compiled else None)
    if zeroed:
        optimizer.zero_grad()
    with pytest.raises(ScheduleError, match=r"^proj: swapped, but not called since.*semisparse\.check"):
        schedule.step()
    assert schedule.applied_steps == 0


def test_a_layer_that_nobody_trains_is_only_warned_of() -> None:
    model = Bypass()
    model.forward = lambda x: model.proj(model.first(x))
    sparsify(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = SparseSchedule.sparse_then_dense(model, 4)
    train(model, optimizer)
    with pytest.warns(UserWarning, match=r"^spare: swapped, but neither called nor trained"):
        assert schedule.step()
    train(model, optimizer)
    assert schedule.step()  # said once


def test_zeroed_gradients_are_no_sign_of_training() -> None:
    model = Bypass()
    model.forward = lambda x: model.proj(model.first(x))
    sparsify(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.spare.weight.grad = torch.zeros_like(model.spare.weight)  # as zero_grad(set_to_none=False) leaves it
    schedule = SparseSchedule.sparse_then_dense(model, 4)
    model(torch.randn(4, 16)).sum().backward()
    optimizer.step()
    with pytest.warns(UserWarning, match="neither called nor trained"):
        assert schedule.step()


def test_calls_are_asked_for_when_the_sparse_phase_begins() -> None:
    model = Bypass()
    sparsify(model, exclude="spare")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = SparseSchedule(model, [Phase("dense", 2), Phase("sparse", 2)])
    for _ in range(2):  # in a dense phase a bypass changes nothing
        train(model, optimizer)
        assert schedule.step()
    train(model, optimizer)
    with pytest.raises(ScheduleError, match="proj: swapped, but not called"):
        schedule.step()


# torch.compile asks so of each non-leaf input whose shape a block looks at.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("how", ["whole", "blocks", "checkpointed"])
def test_compiled_models_raise_no_alarm(how: str) -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.GELU()) for _ in range(3)))
    sparsify(model)
    call = model
    if how == "whole":
        call = torch.compile(model, backend="aot_eager", fullgraph=True)
    elif how == "blocks":
        for block in model:
            block.compile(backend="aot_eager")
    else:

        def call(x):
            return torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)

    optimizer = torch.optim.AdamW(model.parameters())
    schedule = SparseSchedule.sparse_then_dense(model, 4)
    for _ in range(4):
        train(model, optimizer, call)
        assert schedule.step()


def test_the_mark_of_a_call_costs_compiled_code_nothing() -> None:
    model = net()
    graphs = []

    def backend(graph, inputs):
        graphs.append([node.target for node in graph.graph.nodes])
        return graph.forward

    torch.compile(model, backend=backend, fullgraph=True)(torch.randn(4, 16))
    assert len(graphs) == 1
    assert not any(layer._called for layer in (model[0], model[2]))


REPLACED = {
    "another layer": lambda m: m.__setitem__(0, nn.Linear(16, 32)),
    "deleted": lambda m: m.__delitem__(2),
    "densified": lambda m: densify(m),
    "weight_norm": lambda m: nn.utils.parametrizations.weight_norm(m[0]),
    "old weight_norm": lambda m: nn.utils.spectral_norm(m[0]),
    "pruned": lambda m: nn.utils.prune.l1_unstructured(m[0], "weight", 0.5),
}


@pytest.mark.parametrize("how", REPLACED)
@pytest.mark.parametrize("when", ["before the first step", "before the switch"])
def test_layers_that_are_not_what_they_were_stop_the_schedule(how: str, when: str) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = SparseSchedule.sparse_then_dense(model, 4, 0.5)
    if when == "before the switch":
        train(model, optimizer)
        assert schedule.step()
    name = "2" if how == "deleted" else "0"
    REPLACED[how](model)
    with pytest.raises(ScheduleError, match=rf"^{name} is scheduled, but it"):
        schedule.step()
    assert schedule.applied_steps == (when == "before the switch")


def test_metrics_of_replaced_layers_are_refused() -> None:
    model = net()
    metrics = MaskMetrics(model, interval=2)
    model[0] = nn.Linear(16, 32)
    with pytest.raises(ConfigError, match=r"^0 is measured, but it is no longer in the model"):
        metrics.update()


def averaged(model: nn.Module) -> nn.Module:
    return AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))


@pytest.mark.parametrize("made", ["before the schedule", "after it", "after a step"])
def test_a_copy_that_follows_switches_along(made: str) -> None:
    model = net()
    ema = averaged(model) if made == "before the schedule" else None
    schedule = SparseSchedule.sparse_then_dense(model, 4, 0.5)
    if made == "after a step":
        schedule.step()
    ema = ema or averaged(model)
    schedule.follow(ema)
    while schedule.phase == "sparse":
        assert ema.module[0].sparse_enabled
        schedule.step()
    assert not ema.module[0].sparse_enabled
    assert "2 layers of copies follow" in repr(schedule)
    schedule.load_state_dict({**schedule.state_dict(), "applied_steps": 0})
    assert ema.module[0].sparse_enabled


def test_a_copy_that_nobody_follows_is_seen_and_switched() -> None:
    model = net()
    schedule = SparseSchedule.sparse_then_dense(model, 2, 0.5)
    ema, snapshot = averaged(model), copy.deepcopy(model)
    schedule.unfollow(snapshot)
    with pytest.warns(UserWarning, match=r"2 copies of scheduled layers.*schedule\.follow.*schedule\.unfollow"):
        schedule.step()
    assert not model[0].sparse_enabled
    assert not ema.module[0].sparse_enabled
    assert snapshot[0].sparse_enabled


def test_copies_are_kept_weakly_and_copies_of_copies_are_found() -> None:
    model = net()
    schedule = SparseSchedule.sparse_then_dense(model, 2, 0.5)
    gone, kept = copy.deepcopy(model), copy.deepcopy(copy.deepcopy(model))
    del gone
    gc.collect()
    with pytest.warns(UserWarning, match="2 copies"):
        schedule.step()
    assert not kept[0].sparse_enabled


def test_a_copy_with_a_schedule_of_its_own_is_left_alone() -> None:
    model = net()
    other = copy.deepcopy(model)
    schedule, theirs = (SparseSchedule.sparse_then_dense(m, 2, 0.5) for m in (model, other))
    schedule.step()
    assert other[0].sparse_enabled
    theirs.step()
    assert not other[0].sparse_enabled


def test_what_cannot_follow_is_refused() -> None:
    schedule = SparseSchedule.sparse_then_dense(net(), 2)
    with pytest.raises(NoLayerMatched, match="has no semi-sparse layer that could follow"):
        schedule.follow(nn.Linear(16, 16))
    other = nn.ModuleDict({"a": nn.Linear(16, 16)})
    sparsify(other)
    with pytest.raises(NoLayerMatched, match="none of the layers of this schedule"):
        schedule.follow(other)


@pytest.mark.parametrize("preset", ["fst", "s_ste"])
def test_a_copy_shares_what_a_recipe_holds(preset: str) -> None:
    recipe = recipes.fst(refresh_every=1 + 1) if preset == "fst" else recipes.s_ste()
    model = nn.Sequential(nn.Linear(16, 16, bias=False))
    sparsify(model, recipe.config)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    schedule = RecipeSchedule(recipe, model, optimizer, 20)
    ema = averaged(model)
    schedule.follow(ema)
    for _ in range(4):
        train(model, optimizer)
        schedule.step()
    assert ema.module[0]._frozen is model[0]._frozen


def test_a_schedule_is_copied_and_pickled_with_its_model() -> None:
    model = net()
    schedule = SparseSchedule.sparse_then_dense(model, 2, 0.5)
    for clone, twin in (copy.deepcopy((model, schedule)), pickle.loads(pickle.dumps((model, schedule)))):
        optimizer = torch.optim.SGD(clone.parameters(), lr=0.1)
        train(clone, optimizer)
        assert twin.step()
        assert not twin.step()  # it watches the optimizer of its own model
        assert not clone[0].sparse_enabled
        assert model[0].sparse_enabled
    assert schedule.applied_steps == 0


def test_all_schedules_share_one_hook_and_leave_nothing_behind() -> None:
    from torch.optim import optimizer as torch_optimizer

    from semisparse import applied

    schedule = SparseSchedule.sparse_then_dense(net(), 2)
    hooks, listeners = len(torch_optimizer._global_optimizer_post_hooks), len(applied._listeners)
    more = [SparseSchedule.sparse_then_dense(net(), 2) for _ in range(3)]
    assert len(torch_optimizer._global_optimizer_post_hooks) == hooks  # taken off, they could change while torch steps
    assert len(applied._listeners) == listeners + 3
    del schedule, more
    gc.collect()
    assert len(applied._listeners) <= listeners - 1


def test_nothing_is_said_of_an_ordinary_run() -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = SparseSchedule.sparse_then_dense(model, 3, 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            train(model, optimizer)
            assert schedule.step()


def test_the_activation_operand_is_judged_in_eager_mode_too() -> None:
    model = Bypass()
    sparsify(model, SparseConfig(operand="activation"), exclude="spare")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = SparseSchedule.sparse_then_dense(model, 4)
    train(model, optimizer)
    with pytest.raises(ScheduleError, match="proj: swapped, but not called"):
        schedule.step()


class Spare(nn.Module):
    """`b` is not used: an expert without tokens, a pooler, a dropped layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x)


def spare() -> Spare:
    model = Spare()
    sparsify(model)
    return model


NOT_TRAINED = r"^(module\.|0\.)?b: swapped, but neither called nor trained"


def test_a_first_step_that_overflows_decides_nothing() -> None:
    model = spare()
    optimizer, scaler = torch.optim.SGD(model.parameters(), 0.1), torch.amp.GradScaler("cpu")
    schedule = SparseSchedule.sparse_then_dense(model, 4)
    for factor in (float("inf"), 1.0):
        scaler.scale(model(torch.randn(4, 16)).sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if factor == 1.0:
            with pytest.warns(UserWarning, match=NOT_TRAINED):
                assert schedule.step(scaler)
        else:
            assert not schedule.step(scaler)


def test_a_frozen_sparse_base_raises_no_alarm() -> None:
    model = nn.Sequential(spare().requires_grad_(False), nn.Linear(16, 4))
    optimizer = torch.optim.SGD(model[1].parameters(), 0.1)
    schedule = SparseSchedule.sparse_then_dense(model, 4)
    train(model, optimizer)
    optimizer.zero_grad()
    with pytest.warns(UserWarning, match=NOT_TRAINED):
        assert schedule.step()


def test_a_compiled_optimizer_raises_no_alarm() -> None:
    model = spare()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = SparseSchedule.sparse_then_dense(model, 4)
    model(torch.randn(4, 16)).sum().backward()
    torch.compile(optimizer.step, backend="eager")()
    optimizer.zero_grad()
    with pytest.warns(UserWarning, match=NOT_TRAINED):
        assert schedule.step()


def test_parameters_that_were_assigned_anew_are_followed() -> None:
    model = spare()
    schedule = SparseSchedule.sparse_then_dense(model, 4)
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    train(model, optimizer)
    optimizer.zero_grad()
    with pytest.warns(UserWarning, match=NOT_TRAINED):
        assert schedule.step()


class AllBypassed(nn.Module):
    """Every layer is read through a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(16, 16) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.linear(x, layer.weight, layer.bias)
        return x


@pytest.mark.parametrize("early", [False, True])
def test_a_model_whose_layers_are_all_bypassed_is_stopped(early: bool) -> None:
    model = AllBypassed()
    sparsify(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = SparseSchedule.sparse_then_dense(model, 10)
    if early:
        schedule.step()  # before any forward: nothing to be told yet, and nothing decided
    train(model, optimizer)
    with pytest.raises(ScheduleError, match=r"layers\.0, layers\.1, layers\.2: swapped, but not called since: "):
        schedule.step()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("which", ["one block", "all blocks", "an eager look first"])
def test_activation_layers_compiled_by_block_raise_no_alarm(which: str, backend: str) -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16)) for _ in range(3)))
    sparsify(model, SparseConfig(operand="activation"))
    schedule = SparseSchedule.sparse_then_dense(model, 10)
    if which == "an eager look first":
        model[0](torch.randn(4, 16))
    for block in model if which == "all blocks" else model[1:2]:
        block.compile(backend=backend)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        train(model, optimizer)
        optimizer.zero_grad()
        assert schedule.step()


def test_a_replica_of_data_parallel_calls_for_its_original() -> None:
    model = net()
    replica = model[0]._replicate_for_data_parallel()
    replica.weight, replica.bias = model[0].weight.detach(), None
    replica(torch.randn(4, 16))
    assert model[0]._called
    assert "_stands_for" not in dict(replica.named_modules())


@pytest.mark.parametrize("preset", ["fst", "s_ste"])
@pytest.mark.parametrize("how", ["follow", "by itself"])
def test_a_copy_made_before_the_recipe_gets_what_it_holds(preset: str, how: str) -> None:
    recipe = recipes.fst(refresh_every=2) if preset == "fst" else recipes.s_ste()
    model = nn.Sequential(nn.Linear(16, 16, bias=False))
    sparsify(model, recipe.config)
    ema = averaged(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    schedule = RecipeSchedule(recipe, model, optimizer, 20)
    if how == "follow":
        schedule.follow(ema)
    train(model, optimizer)
    if how == "follow":
        schedule.step()
    else:
        with pytest.warns(UserWarning, match="1 copies of scheduled layers"):
            schedule.step()
    assert ema.module[0]._frozen is model[0]._frozen
    ema(torch.randn(4, 16))
    schedule.finish()
    assert "_frozen" not in vars(model[0])
    assert "_frozen" not in vars(ema.module[0])


def test_a_copy_made_in_mid_phase_is_taken_along_at_the_next_refresh() -> None:
    recipe = recipes.fst(refresh_every=2)
    model = nn.Sequential(nn.Linear(16, 16, bias=False))
    sparsify(model, recipe.config)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    schedule = RecipeSchedule(recipe, model, optimizer, 40)
    for number in range(4):
        if number == 3:
            ema = averaged(model)
        train(model, optimizer)
        if number < 3:
            schedule.step()
    with pytest.warns(UserWarning, match="copies"):
        schedule.step()
    assert ema.module[0]._frozen is model[0]._frozen


def test_thousands_of_layers_are_followed_quickly() -> None:
    import time

    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(2000)))
    sparsify(model)
    schedule, other = SparseSchedule.sparse_then_dense(model, 4), copy.deepcopy(model)
    start = time.perf_counter()
    schedule.follow(other)
    assert time.perf_counter() - start < 3


@pytest.mark.parametrize("wrong", [None, 3, "model"])
def test_what_is_no_module_is_named(wrong: object) -> None:
    schedule = SparseSchedule.sparse_then_dense(net(), 4)
    for call in (lambda: SparseSchedule.sparse_then_dense(wrong, 4), lambda: schedule.follow(wrong),
                 lambda: schedule.unfollow(wrong), lambda: MaskMetrics(wrong)):  # fmt: skip
        with pytest.raises(ConfigError, match=r"pass a torch\.nn\.Module"):
            call()
    with pytest.raises(ScheduleError, match="must be a list of Phase"):
        SparseSchedule(net(), 5)


def test_a_copied_schedule_goes_on_comparing_nothing() -> None:
    schedule = SparseSchedule.sparse_then_dense(net(), 4, process_group=False)
    assert copy.deepcopy(schedule)._group is False


@pytest.mark.parametrize("how", ["weight_norm", "prune"])
def test_metrics_of_computed_weights_are_refused(how: str) -> None:
    model = net()
    metrics = MaskMetrics(model, interval=2)
    if how == "prune":
        nn.utils.prune.l1_unstructured(model[0], "weight", 0.5)
    else:
        nn.utils.parametrizations.weight_norm(model[0])
    with pytest.raises(ConfigError, match=r"^0 is measured, but it"):
        metrics.update()
