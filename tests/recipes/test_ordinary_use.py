"""Recipes with frozen layers, wrapped optimizers, wrapped models, and states that are not ordinary tensors."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from semisparse import recipes, sparsify
from semisparse.errors import ConfigError, ScheduleError
from semisparse.recipes import MaskedDecay, Recipe, RecipeSchedule, StepAdamW

PRESETS: dict[str, Callable[[], Recipe]] = {
    "dinov2": recipes.dinov2,
    "sr_ste": recipes.sr_ste,
    "fst": lambda: recipes.fst(refresh_every=2),
    "s_ste": recipes.s_ste,
    "step": recipes.step,
}
EACH = pytest.mark.parametrize("preset", PRESETS)


def net(recipe: Recipe) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16))
    sparsify(model, recipe.config)
    return model


def optimizer_of(recipe: Recipe, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    cls = StepAdamW if recipe.dense_range else torch.optim.AdamW
    return cls(parameters, lr=0.1)


def train(model: nn.Module, optimizer, schedule: RecipeSchedule, steps: int = 4) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 16)).square().mean().backward()
        optimizer.step()
        assert schedule.step()


@EACH
def test_frozen_layers_stay_as_they_are_and_the_others_train(preset: str) -> None:
    recipe = PRESETS[preset]()
    model = net(recipe)
    model[0].requires_grad_(False)
    before = [layer.weight.detach().clone() for layer in (model[0], model[2])]
    optimizer = optimizer_of(recipe, [p for p in model.parameters() if p.requires_grad])
    schedule = RecipeSchedule(recipe, model, optimizer, 20)
    train(model, optimizer, schedule)
    assert torch.equal(model[0].weight, before[0])
    assert not torch.equal(model[2].weight, before[1])
    again = net(recipe)
    again[0].requires_grad_(False)
    other = optimizer_of(recipe, [p for p in again.parameters() if p.requires_grad])
    RecipeSchedule(recipe, again, other, 20).load_state_dict(schedule.state_dict())


def test_a_layer_that_trains_without_an_optimizer_is_still_an_error() -> None:
    model = net(recipes.sr_ste())
    with pytest.raises(ConfigError, match=r"does not hold 0\.weight.*freeze this one"):
        RecipeSchedule(recipes.sr_ste(), model, torch.optim.SGD(model[2].parameters(), lr=0.1), 20)


def test_step_needs_something_that_trains() -> None:
    model = net(recipes.step())
    model.append(nn.Linear(16, 16))
    model[0].requires_grad_(False)
    model[2].requires_grad_(False)
    with pytest.raises(ConfigError, match="no sparse weight requires a gradient"):
        RecipeSchedule(recipes.step(), model, StepAdamW(model[3].parameters()), 20)


class Duck:
    """A wrapper that is not an Optimizer."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.optimizer, self.step_was_skipped = inner, False

    def __getattr__(self, name: str):
        return getattr(self.optimizer, name)


class Subclass(torch.optim.Optimizer):
    """accelerate's: an Optimizer by inheritance, without its __init__."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner = inner

    param_groups = property(lambda self: self.inner.param_groups)

    def step(self, closure=None):
        return self.inner.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none)


WRAPPERS = {"duck": Duck, "subclass": Subclass, "twice": lambda inner: Duck(Subclass(inner))}


@EACH
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapped_optimizer_is_the_one_inside(preset: str, wrapper: str) -> None:
    recipe = PRESETS[preset]()
    weights = []
    for wrap in (WRAPPERS[wrapper], lambda inner: inner):
        model = net(recipe)
        optimizer = wrap(optimizer_of(recipe, list(model.parameters())))
        schedule = RecipeSchedule(recipe, model, optimizer, 20)
        torch.manual_seed(1)
        train(model, optimizer, schedule)
        weights.append(model[0].weight.detach())
    assert torch.equal(*weights)


def test_masked_decay_takes_a_wrapper_too() -> None:
    model = net(recipes.sr_ste())
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    MaskedDecay(model, Subclass(inner), 1e-4)
    assert inner._optimizer_step_pre_hooks


@pytest.mark.parametrize(
    "wrong", [object(), None, "adam", Duck(torch.nn.Linear(2, 2))], ids=["object", "None", "str", "duck"]
)
def test_what_holds_no_optimizer_is_named(wrong: object) -> None:
    with pytest.raises(ConfigError, match=r"optimizer=\w+ is not a torch\.optim\.Optimizer.*wraps 0 of them"):
        RecipeSchedule(recipes.sr_ste(), net(recipes.sr_ste()), wrong, 20)


def test_two_optimizers_in_one_wrapper_are_too_many() -> None:
    model = net(recipes.sr_ste())
    both = Duck(torch.optim.SGD(model[0].parameters(), lr=0.1))
    both.second = torch.optim.SGD(model[2].parameters(), lr=0.1)
    with pytest.raises(ConfigError, match="wraps 2 of them"):
        RecipeSchedule(recipes.sr_ste(), model, both, 20)


HOLDERS = {
    "DataParallel": nn.DataParallel,
    "AveragedModel": AveragedModel,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "both": lambda model: nn.DataParallel(torch.compile(model, backend="eager")),
}


@pytest.mark.parametrize("saved", ["bare", *HOLDERS])
@pytest.mark.parametrize("loaded", ["bare", *HOLDERS])
def test_states_have_the_same_names_however_the_model_is_wrapped(saved: str, loaded: str) -> None:
    recipe = recipes.fst(refresh_every=3)
    schedules = []
    for how in (saved, loaded):
        model = HOLDERS.get(how, lambda model: model)(net(recipe))
        schedules.append(RecipeSchedule(recipe, model, torch.optim.SGD(model.parameters(), lr=0.1), 20))
    state = schedules[0].state_dict()
    assert set(state["masks"]) == {"0", "2"}
    schedules[1].load_state_dict(state)


def test_a_module_of_the_users_own_that_is_called_module_keeps_its_name() -> None:
    recipe = recipes.fst(refresh_every=3)
    model = nn.ModuleDict({"module": nn.Linear(16, 16)})
    sparsify(model, recipe.config)
    schedule = RecipeSchedule(recipe, model, torch.optim.SGD(model.parameters(), lr=0.1), 20)
    assert set(schedule.state_dict()["masks"]) == {"module"}


ODD: dict[str, Callable[[Tensor], object]] = {
    "sparse": lambda codes: codes.to_sparse(),
    "meta": lambda codes: codes.to("meta"),
    "list": lambda codes: codes.tolist(),
    "none": lambda codes: None,
    "other dtype": lambda codes: codes.int(),
    "other shape": lambda codes: codes[:1],
    "not 2:4": torch.zeros_like,
    "subclass": lambda codes: codes.as_subclass(Marked),
}


class Marked(Tensor):
    """Some tensor subclass."""


@pytest.mark.parametrize("how", ODD)
def test_masks_of_a_state_that_cannot_be_held_are_named_and_change_nothing(how: str) -> None:
    recipe = recipes.fst(refresh_every=3)
    model = net(recipe)
    schedule = RecipeSchedule(recipe, model, torch.optim.SGD(model.parameters(), lr=0.1), 20)
    before = schedule.state_dict()
    state = schedule.state_dict()
    state["masks"]["2"] = ODD[how](state["masks"]["2"])
    with pytest.raises(ScheduleError, match=r"state\['masks'\]\['2'\]"):
        schedule.load_state_dict(state)
    assert all(torch.equal(before["masks"][name], schedule.state_dict()["masks"][name]) for name in before["masks"])


@pytest.mark.parametrize("how", ["sparse", "meta"])
def test_scales_of_a_state_that_cannot_be_held_are_named(how: str) -> None:
    recipe = recipes.s_ste()
    model = net(recipe)
    schedule = RecipeSchedule(recipe, model, torch.optim.SGD(model.parameters(), lr=0.1), 20)
    state = schedule.state_dict()
    state["scales"]["0"] = ODD[how](state["scales"]["0"])
    with pytest.raises(ScheduleError, match=r"state\['scales'\]\['0'\]"):
        schedule.load_state_dict(state)
