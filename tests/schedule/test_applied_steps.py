"""Which calls of step() count: what an optimizer did decides, for any scaler policy and count of micro-batches."""

import math

import pytest
import torch
from torch import nn

from semisparse import Phase, SparseSchedule, recipes, sparsify
from semisparse.errors import ScheduleError
from semisparse.recipes import RecipeSchedule


def net() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(16, 16))
    sparsify(model)
    return model


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "adamw fused": lambda p: torch.optim.AdamW(p, fused=True),
    "adamw foreach": lambda p: torch.optim.AdamW(p, foreach=True),
    "adamw loop": lambda p: torch.optim.AdamW(p, foreach=False),
}


def floor(scaler: torch.amp.GradScaler) -> None:
    if scaler.get_scale() < 2:
        scaler.update(2.0)


POLICIES = {
    "default": ({}, lambda scaler: None),
    "floor": ({"init_scale": 2.0}, floor),
    "constant": ({"init_scale": 8.0}, lambda scaler: scaler.update(8.0)),
    "grows at once": ({"init_scale": 2.0, "growth_interval": 1}, lambda scaler: None),
    "raised by hand": ({"init_scale": 4.0}, lambda scaler: scaler.update(scaler.get_scale() * 4)),
}


@pytest.mark.parametrize("first", [False, True], ids=["first applied", "first skipped"])
@pytest.mark.parametrize("zeroed", [False, True], ids=["", "zeroed before"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_skipped_step_never_counts_whatever_the_scale_does(
    optimizer: str, policy: str, zeroed: bool, first: bool
) -> None:
    model = net()
    opt = OPTIMIZERS[optimizer](model.parameters())
    settings, after = POLICIES[policy]
    scaler = torch.amp.GradScaler("cpu", **settings)
    schedule = SparseSchedule.sparse_then_dense(model, 20)
    pattern = [not first, False, False, True, False, True]
    counted, moved = [], []
    for good in pattern:
        before = model[0].weight.detach().clone()
        opt.zero_grad()
        scaler.scale(model(torch.randn(4, 16)).square().sum() * (1.0 if good else math.inf)).backward()
        scaler.step(opt)
        scaler.update()
        after(scaler)
        moved.append(not torch.equal(before, model[0].weight))
        if zeroed:
            opt.zero_grad()
        counted.append(schedule.step(scaler))
    assert moved == pattern
    assert counted == pattern
    assert schedule.applied_steps == sum(pattern)


def test_a_scale_that_fell_to_zero_goes_on_skipping() -> None:
    model = net()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=0.0)
    schedule = SparseSchedule.sparse_then_dense(model, 20)
    for _ in range(3):
        before = model[0].weight.detach().clone()
        opt.zero_grad()
        scaler.scale(model(torch.randn(4, 16)).sum() * math.inf).backward()
        scaler.step(opt)
        scaler.update()
        assert schedule.step(scaler) is False
        assert torch.equal(before, model[0].weight)


@pytest.mark.parametrize("how", ["step()", "skipped=", "scaler"])
@pytest.mark.parametrize("keeps_gradients", [True, False])
def test_micro_batches_count_once_a_step(how: str, keeps_gradients: bool) -> None:
    model = net()
    opt = torch.optim.AdamW(model.parameters())
    scaler = torch.amp.GradScaler("cpu", enabled=how == "scaler")
    schedule = SparseSchedule.sparse_then_dense(model, 20)
    counted = []
    for batch in range(8):
        scaler.scale(model(torch.randn(4, 16)).square().sum()).backward()
        if batch % 4 == 3:
            scaler.step(opt)
            scaler.update()
            if not keeps_gradients:
                opt.zero_grad()
        arguments = {"step()": {}, "skipped=": {"skipped": False}, "scaler": {"scaler": scaler}}[how]
        counted.append(schedule.step(**arguments))
    assert counted == [False, False, False, True] * 2


def test_skipped_as_reported_by_the_caller_decides() -> None:
    model = net()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = SparseSchedule.sparse_then_dense(model, 20)
    for skipped in (False, True, False):
        model(torch.randn(4, 16)).sum().backward()
        opt.step()
        assert schedule.step(skipped=skipped) is not skipped


def test_optimizers_of_other_models_do_not_count() -> None:
    model, other = net(), nn.Linear(4, 4)
    ours, theirs = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, other))
    schedule = SparseSchedule.sparse_then_dense(model, 20)
    model(torch.randn(4, 16)).sum().backward()
    ours.step()
    assert schedule.step()
    other(torch.randn(1, 4)).sum().backward()
    theirs.step()
    assert not schedule.step()


def test_two_optimizers_of_one_model_are_one_step() -> None:
    model = net()
    opts = [torch.optim.SGD([p], lr=0.1) for p in model.parameters()]
    schedule = SparseSchedule.sparse_then_dense(model, 20)
    for _ in range(2):
        model(torch.randn(4, 16)).sum().backward()
        for opt in opts:
            opt.step()
        assert schedule.step()
        assert not schedule.step()
    assert schedule.applied_steps == 2


def test_what_is_not_a_torch_optimizer_is_judged_by_the_weights() -> None:
    model = net()
    schedule = SparseSchedule.sparse_then_dense(model, 20)
    counted = []
    for batch in range(6):
        model(torch.randn(4, 16)).sum().backward()
        if batch % 3 == 2:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 0.1 * parameter.grad
            model.zero_grad()
        counted.append(schedule.step())
    assert counted == [False, False, True] * 2


def test_without_any_optimizer_every_call_counts() -> None:
    schedule = SparseSchedule.sparse_then_dense(net(), 4, 0.5)
    assert [schedule.step() for _ in range(3)] == [True] * 3
    assert schedule.phase == "dense"


def test_a_closure_counts_once() -> None:
    model = net()
    opt = torch.optim.LBFGS(model.parameters(), max_iter=3)
    schedule = SparseSchedule.sparse_then_dense(model, 20)
    x = torch.randn(4, 16)

    def closure():
        opt.zero_grad()
        loss = model(x).square().sum()
        loss.backward()
        return loss

    for _ in range(3):
        opt.step(closure)
        assert schedule.step()
    assert schedule.applied_steps == 3


def test_a_compiled_optimizer_counts() -> None:
    model = net()
    opt = torch.optim.SGD(model.parameters(), lr=torch.tensor(0.1))
    schedule = SparseSchedule.sparse_then_dense(model, 20)
    step = torch.compile(opt.step, backend="eager")
    for _ in range(3):
        opt.zero_grad()
        model(torch.randn(4, 16)).sum().backward()
        step()
        assert schedule.step()
        assert not schedule.step()


@pytest.mark.parametrize("arguments", [{"skipped": 1}, {"skipped": "no"}, {"scaler": object()}, {"scaler": True},
                                       {"scaler": torch.amp.GradScaler("cpu"), "skipped": False}])  # fmt: skip
def test_wrong_arguments_are_named(arguments: dict) -> None:
    schedule = SparseSchedule.sparse_then_dense(net(), 4)
    with pytest.raises(ScheduleError, match=r"skipped=|GradScaler"):
        schedule.step(**arguments)
    assert schedule.applied_steps == 0


def test_resume_at_a_number() -> None:
    model = net()
    schedule = SparseSchedule(model, [Phase("sparse", 3), Phase("dense", 3)])
    schedule.resume_at(3)
    assert schedule.phase == "dense"
    assert not model[0].sparse_enabled
    schedule.resume_at(0)
    assert model[0].sparse_enabled
    for wrong in (-1, 1.0, True, "3", None):
        with pytest.raises(ScheduleError, match="applied_steps="):
            schedule.resume_at(wrong)


@pytest.mark.parametrize("preset", [recipes.fst, recipes.s_ste])
def test_a_recipe_that_holds_more_than_a_counter_wants_its_state(preset) -> None:
    recipe = preset()
    model = nn.Sequential(nn.Linear(16, 16))
    sparsify(model, recipe.config)
    schedule = RecipeSchedule(recipe, model, torch.optim.SGD(model.parameters(), lr=0.1), 10)
    with pytest.raises(ScheduleError, match=r"save state_dict\(\) and load it"):
        schedule.resume_at(3)
    plain = RecipeSchedule(recipes.dinov2(), (other := net()), torch.optim.SGD(other.parameters(), lr=0.1), 10)
    plain.resume_at(8)
    assert plain.phase == "dense"


@pytest.mark.parametrize("scale", [math.nan, math.inf, -1.0, True, "1"])
def test_a_saved_scale_must_be_a_finite_number(scale: object) -> None:
    schedule = SparseSchedule.sparse_then_dense(net(), 4)
    with pytest.raises(ScheduleError, match="last_scale"):
        schedule.load_state_dict({**schedule.state_dict(), "last_scale": scale})


def test_weights_that_are_written_by_data_count() -> None:
    model = net()
    schedule = SparseSchedule.sparse_then_dense(model, 20)
    masters = [parameter.detach().clone() for parameter in model.parameters()]
    opt = torch.optim.AdamW(masters, lr=1e-2)  # holds no parameter of the model
    for _ in range(3):
        model.zero_grad()
        model(torch.randn(4, 16)).sum().backward()
        for master, parameter in zip(masters, model.parameters(), strict=True):
            master.grad = parameter.grad
        opt.step()
        for master, parameter in zip(masters, model.parameters(), strict=True):
            parameter.data.copy_(master)
        assert schedule.step()


def test_a_schedule_that_never_sees_a_step_says_so() -> None:
    model = net()
    schedule = SparseSchedule.sparse_then_dense(model, 20)
    model(torch.randn(4, 16)).sum().backward()
    with pytest.warns(UserWarning, match="64 times in a row without an optimizer step of this model"):
        assert not any(schedule.step() for _ in range(64))


def test_two_schedules_both_hear_a_compiled_step() -> None:
    models = [net(), net()]
    opt = torch.optim.SGD([p for model in models for p in model.parameters()], lr=torch.tensor(0.1))
    schedules = [SparseSchedule.sparse_then_dense(model, 20) for model in models]
    sum(model(torch.randn(4, 16)).sum() for model in models).backward()
    torch.compile(opt.step, backend="eager")()
    assert [schedule.step() for schedule in schedules] == [True, True]


def test_steps_by_hand_after_steps_of_an_optimizer_count() -> None:
    model = net()
    schedule, opt = SparseSchedule.sparse_then_dense(model, 200), torch.optim.AdamW(model.parameters())
    for number in range(8):
        model.zero_grad()
        model(torch.randn(4, 16)).square().mean().backward()
        if number < 3:
            opt.step()
        else:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.sub_(parameter.grad, alpha=0.01)
        assert schedule.step()


def test_an_optimizer_that_gets_the_model_later_counts() -> None:
    model, other = net(), nn.Linear(4, 4)
    schedule, opt = SparseSchedule.sparse_then_dense(model, 20), torch.optim.AdamW(other.parameters())
    opt.step()
    opt.add_param_group({"params": list(model.parameters())})
    for _ in range(2):
        model(torch.randn(4, 16)).sum().backward()
        opt.step()
        assert schedule.step()
        assert not schedule.step()


def test_micro_batches_of_a_frozen_sparse_base_count_once_a_step() -> None:
    base = net().requires_grad_(False)
    model = nn.Sequential(base, nn.Linear(16, 16))
    schedule, opt = SparseSchedule.sparse_then_dense(model, 20), torch.optim.AdamW(model[1].parameters())
    counted = []
    for batch in range(8):
        model(torch.randn(4, 16)).square().mean().backward()
        if batch % 4 == 3:
            opt.step()
            opt.zero_grad()
        counted.append(schedule.step())
    assert counted == [False, False, False, True] * 2


def test_a_compiled_step_of_another_model_does_not_count() -> None:
    other, model = nn.Linear(16, 16), net()
    schedule = SparseSchedule.sparse_then_dense(model, 100)
    theirs, ours = (torch.optim.Adam(m.parameters()) for m in (other, model))
    step, counted = torch.compile(lambda: theirs.step(), backend="eager"), []
    for batch in range(8):
        theirs.zero_grad()
        other(torch.randn(4, 16)).mean().backward()
        step()
        model(torch.randn(4, 16)).square().mean().backward()
        if batch % 4 == 3:
            ours.step()
            ours.zero_grad()
        counted.append(schedule.step())
    assert counted == [False, False, False, True] * 2


@pytest.mark.parametrize("fused", [True, False])
def test_one_scaler_may_serve_another_optimizer_that_overflows(fused: bool) -> None:
    model, other = net(), nn.Linear(16, 16)
    ours, theirs = (torch.optim.AdamW(m.parameters(), fused=fused) for m in (model, other))
    scaler, schedule = torch.amp.GradScaler("cpu"), SparseSchedule.sparse_then_dense(model, 20)
    for our_factor, their_factor in ((1.0, math.inf), (math.inf, 1.0), (1.0, 1.0)):
        ours.zero_grad()
        theirs.zero_grad()
        for m, factor in ((model, our_factor), (other, their_factor)):
            scaler.scale(m(torch.randn(4, 16)).sum() * factor).backward()
        scaler.step(ours)
        scaler.step(theirs)
        scaler.update()
        assert schedule.step(scaler) is (our_factor == 1.0)


def test_a_step_that_the_host_did_not_count_is_not_counted_later() -> None:
    model = net()
    opt, schedule = torch.optim.SGD(model.parameters(), lr=0.1), SparseSchedule.sparse_then_dense(model, 20)
    model(torch.randn(4, 16)).sum().backward()
    opt.step()
    assert schedule.step()
    opt.step()
    assert not schedule.step(skipped=True)
    assert not schedule.step()


@pytest.mark.parametrize("how", ["load_state_dict", "resume_at"])
def test_loading_a_checkpoint_is_not_a_step(how: str) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = SparseSchedule.sparse_then_dense(model, 4)
    model.load_state_dict({name: value + 1 for name, value in model.state_dict().items()})
    if how == "resume_at":
        schedule.resume_at(2)
    else:
        schedule.load_state_dict(schedule.state_dict() | {"applied_steps": 2})
    counted = []
    for micro_batch in range(4):
        model(torch.randn(4, 16)).square().sum().backward()
        if micro_batch % 2:
            optimizer.step()
            optimizer.zero_grad()
        counted.append(schedule.step())
    assert counted == [False, True, False, True]
