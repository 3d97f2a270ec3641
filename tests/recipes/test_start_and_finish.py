"""How a recipe starts and ends: what it refuses, that a refusal changes nothing, and that the end takes all off."""

import copy
import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from semisparse import SparseConfig, densify, sparsify
from semisparse.errors import ConfigError, LayerRefusedError, NoLayerMatchedError, ScheduleError
from semisparse.recipes import MaskedDecay, Recipe, RecipeSchedule, StepAdamW, dinov2, fst, s_ste, sr_ste, step
from semisparse.testing import assert_bit_equal
from tests.recipes.training import DECAY, RECIPES, SPARSE, Run, assert_same, by_hand, kept, network
from tests.support import held_by


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    """Everything that a start could touch."""
    modules = [
        (
            type(m),
            {k: (id(v) if isinstance(v, Tensor) else v) for k, v in vars(m).items() if not k.startswith("_")},
            id(held_by(m)),
        )
        for m in model.modules()
    ]
    hooks = [list(getattr(optimizer, f"_optimizer_step_{kind}_hooks", OrderedDict())) for kind in ("pre", "post")]
    return modules, hooks, [p.detach().clone() for p in model.parameters()]


def started(**changes: Any) -> Callable[[], tuple[Any, nn.Module, Any, Any]]:
    """The arguments of RecipeSchedule, made anew at each call; changes: a function of the model, or the value."""

    def make() -> tuple[Any, nn.Module, Any, Any]:
        recipe = changes.get("recipe", fst())
        model = network()
        config = changes.get("config", recipe.config if isinstance(recipe, Recipe) else SparseConfig())
        if config is not None:
            sparsify(model, config, select=list(SPARSE))
        model = changes.get("model", lambda m: m)(model)
        default = StepAdamW if isinstance(recipe, Recipe) and recipe.dense_range else torch.optim.AdamW
        optimizer = changes.get("optimizer", lambda m: default(m.parameters()))(model)
        return recipe, model, optimizer, changes.get("total_steps", 100)

    return make


def with_other_beta(model: nn.Module) -> StepAdamW:
    first, rest = list(model[0].parameters()), list(model[1:].parameters())
    return StepAdamW([{"params": first, "betas": (0.9, 0.9)}, {"params": rest}])


def already_frozen(model: nn.Module) -> StepAdamW:
    optimizer = StepAdamW(model.parameters())
    optimizer.freeze_variance()
    return optimizer


def still_hooked(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters())
    RecipeSchedule(fst(), model, optimizer, 10)
    return optimizer


BAD_STARTS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "recipe": ({"recipe": "fst"}, ConfigError, "recipe='fst' must be a Recipe, such as"),
    "not swapped": ({"config": None}, NoLayerMatchedError, "model=Sequential has no SemiSparseLinear .*call sparsify"),
    "only activations": ({"config": SparseConfig(weight=None, activation="transposable")}, NoLayerMatchedError,
                         "call sparsify"),
    "mask": ({"recipe": s_ste(), "config": SparseConfig()}, ConfigError,
             "0 was swapped with .*weight='transposable'.* recipe s_ste has .*weight='soft'.*: sparsify with recipe"),
    "backend": ({"config": SparseConfig(backend="dense")}, ConfigError, "0 was swapped with .*backend='dense'"),
    "no optimizer": ({"optimizer": lambda m: object()}, ConfigError, "optimizer=object is not a torch.optim.Optimizer"),
    "not all weights": ({"optimizer": lambda m: torch.optim.AdamW(m[0].parameters())}, ConfigError,
                        r"optimizer does not hold 2\.weight; build it with all"),
    "adamw for step": ({"recipe": step(), "optimizer": lambda m: torch.optim.AdamW(m.parameters())}, ConfigError,
                       "optimizer=AdamW has no variance to freeze; the recipe step needs .*StepAdamW"),
    "two beta2": ({"recipe": step(), "optimizer": with_other_beta}, ConfigError,
                  r"\(beta2, eps\) of \[\(0\.9, 1e-08\), \(0\.999, 1e-08\)\]"),
    "frozen before": ({"recipe": step(), "optimizer": already_frozen}, ConfigError, "its variance is already frozen"),
    "hooks left": ({"optimizer": still_hooked}, ConfigError,
                   r"still has the hooks of the recipe fst; call finish\(\) of its schedule"),
    "no steps": ({"total_steps": 0}, ScheduleError, "total_steps=0 must be a whole number of steps, 1 or more"),
    "half a step": ({"total_steps": 1.5}, ScheduleError, r"total_steps=1\.5 must be"),
    "true": ({"total_steps": True, "recipe": step()}, ScheduleError, "total_steps=True must be"),
    "no dense step": ({"recipe": step(dense_range=(0, 0.1)), "total_steps": 4}, ScheduleError,
                      r"total_steps=4: dense_range=\(0\.0, 0\.1\) leaves no dense step"),
    **{f"meta {name}": ({"recipe": make(), "model": lambda m: m.to("meta")}, LayerRefusedError,
                        r"0\.weight is on the meta device; materialise")
       for name, make in (("sr_ste", sr_ste), ("fst", fst), ("s_ste", s_ste), ("step", step))},
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_STARTS)
def test_a_start_that_fails_says_why_and_leaves_everything_as_it_was(case: str) -> None:
    changes, error, message = BAD_STARTS[case]
    recipe, model, optimizer, total = started(**changes)()
    before = snapshot(model, optimizer)
    with pytest.raises(error, match=message):
        RecipeSchedule(recipe, model, optimizer, total)
    after = snapshot(model, optimizer)
    assert before[:2] == after[:2]
    if not case.startswith("meta"):
        for one, other in zip(before[2], after[2], strict=True):
            assert_bit_equal(one, other)


class Sharded(torch.nn.Parameter):
    """Looks like a DTensor to those who ask."""

    def full_tensor(self) -> Tensor:
        raise NotImplementedError


@pytest.mark.parametrize("recipe", [sr_ste(), fst(), s_ste(), step()], ids=lambda recipe: recipe.name)
def test_a_sharded_weight_is_refused_where_all_of_it_must_be_seen(recipe: Recipe) -> None:
    def shard(model: nn.Module) -> nn.Module:
        model[2]._parameters["weight"] = Sharded(model[2].weight.detach())
        return model

    arguments = started(recipe=recipe, model=shard)()
    before = snapshot(arguments[1], arguments[2])[:2]
    with pytest.raises(LayerRefusedError, match=r"2\.weight is a sharded DTensor; .*: use dinov2"):
        RecipeSchedule(*arguments)
    assert snapshot(arguments[1], arguments[2])[:2] == before
    RecipeSchedule(*started(recipe=dinov2(), model=shard)())


@pytest.mark.parametrize("name", RECIPES)
def test_finish_takes_everything_off(name: str) -> None:
    run = Run(RECIPES[name]())
    run.steps(0, 11)
    flags = [run.layer(layer).sparse_enabled for layer in SPARSE]
    run.schedule.finish()
    run.schedule.finish()
    assert not run.optimizer._optimizer_step_pre_hooks
    assert all(held_by(module) is None for module in run.model.modules())
    assert [run.layer(layer).sparse_enabled for layer in SPARSE] == flags
    state = run.schedule.state_dict()
    for call in (run.schedule.step, lambda: run.schedule.load_state_dict(state)):
        with pytest.raises(ScheduleError, match=rf"finish\(\) has ended the recipe {run.recipe.name}; start a new"):
            call()
    assert_same(run.schedule.state_dict(), state)
    if run.recipe.dense_range is None:
        RecipeSchedule(run.recipe, run.model, run.optimizer, 5)


def test_after_finish_masks_are_chosen_at_every_forward() -> None:
    run = Run(fst(refresh_every=100))
    run.steps(0, 5)
    stale = run.layer("0").pruned_weight()
    run.schedule.finish()
    fresh = kept(run.layer("0").weight, by_hand(run.layer("0").weight, "transposable"))
    assert_bit_equal(run.layer("0").pruned_weight(), fresh)
    assert not torch.equal(stale, fresh)


def test_densify_then_training_on_needs_no_finish() -> None:
    run = Run(fst(decay=DECAY, refresh_every=3))
    run.steps(0, 4)
    densify(run.model)
    run.backward(5)
    gradient = run.layer("0").weight.grad.clone()
    run.optimizer.step()
    assert_bit_equal(run.layer("0").weight.grad, gradient)  # nothing decays any more
    run.schedule.finish()
    assert all(held_by(module) is None for module in run.model.modules())


def test_a_later_recipe_on_the_same_model_is_not_undone_by_the_first_ones_finish() -> None:
    run = Run(fst(refresh_every=3))
    other = torch.optim.SGD(run.model.parameters(), lr=0.1)
    RecipeSchedule(fst(refresh_every=5), run.model, other, 10)
    theirs = held_by(run.layer("0"))
    run.schedule.finish()
    assert held_by(run.layer("0")) is theirs


def test_a_start_clears_what_an_earlier_recipe_left() -> None:
    run = Run(fst(refresh_every=3, grad_output=None))
    model = copy.deepcopy(run.model)  # keeps its masks
    assert held_by(model[0]) is not None
    RecipeSchedule(dinov2(), model, torch.optim.SGD(model.parameters()), 10)
    assert held_by(model[0]) is None


@pytest.mark.parametrize("name", RECIPES)
def test_a_running_recipe_is_neither_copied_nor_pickled(name: str) -> None:
    run = Run(RECIPES[name]())
    for make in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(ScheduleError, match=r"cannot be copied or pickled.*save state_dict\(\)"):
            make(run.schedule)


def test_a_second_decay_on_the_same_optimizer_is_the_users_own() -> None:
    """MaskedDecay alone is not a recipe: it can be added where a recipe has none."""
    run = Run(dinov2())
    MaskedDecay(run.model, run.optimizer, DECAY)
    run.backward(0)
    plain, weight = run.layer("0").weight.grad.clone(), run.layer("0").weight.detach().clone()
    run.apply()
    term = DECAY * torch.where(by_hand(weight, "transposable"), 0, weight)
    torch.testing.assert_close(run.layer("0").weight.grad, plain + term)


@pytest.mark.parametrize(("recipe", "grad_output"), [(fst(refresh_every=3), None), (dinov2(), "mvue")])
def test_layers_keep_another_grad_output_and_the_log_says_so(recipe, grad_output, caplog) -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    sparsify(model, SparseConfig(grad_output=grad_output))
    RecipeSchedule(recipe, model, torch.optim.SGD(model.parameters()), 10)
    assert [layer.sparse_config.grad_output for layer in model] == [grad_output] * 2
    assert [layer.held_seed is not None for layer in model] == [grad_output == "mvue"] * 2
    (record,) = caplog.records
    named = f"2 layers (0, ...) were swapped with another grad_output or precision than the recipe {recipe.name}"
    assert named in record.message
