"""What a recipe consists of once it starts with a model and an optimizer, and whether it can."""

import logging
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn

from semisparse.config import SparseConfig
from semisparse.errors import ConfigError, ScheduleError
from semisparse.nn import SemiSparseLinear
from semisparse.recipes.auto_switch import AutoSwitch
from semisparse.recipes.held import Held, HeldMasks, HeldScales
from semisparse.recipes.layers import check_optimizer, check_whole, layers_by_weight, unwrapped
from semisparse.recipes.recipe import Recipe
from semisparse.recipes.step_adamw import StepAdamW
from semisparse.schedule.phases import Phase, share_of, sparse_then_dense
from semisparse.surgery.layers import layers_with_masks

logger = logging.getLogger(__name__)

HOOKED: WeakKeyDictionary[torch.optim.Optimizer, str] = WeakKeyDictionary()
"""Optimizer -> the recipe that has its hooks on it: with those of a second one, weights would decay twice."""


class Parts(NamedTuple):
    """A recipe with a model and an optimizer.

    Attributes:
        recipe: Its settings.
        total_steps: Optimizer steps of the whole run.
        optimizer: The one that really steps, without wrappers.
        phases: As planned at the start.
        held: Masks or scales that are held on the layers.
        switch: The rule that ends a dense phase at the start.
    """

    recipe: Recipe
    total_steps: int
    optimizer: torch.optim.Optimizer
    phases: tuple[Phase, ...]
    held: Held | None
    switch: AutoSwitch | None


def parts_of(recipe: Recipe, model: nn.Module, optimizer: torch.optim.Optimizer, total_steps: int) -> Parts:
    """The parts of recipe, with nothing attached or changed so far; arguments and errors as for RecipeSchedule."""
    if not isinstance(recipe, Recipe):
        raise ConfigError(f"recipe={recipe!r} must be a Recipe, such as semisparse.recipes.dinov2()")
    layers = layers_by_weight(model)
    inner = unwrapped(optimizer)
    _check(recipe, model, inner, layers)
    phases = phases_of(recipe, total_steps)
    return Parts(
        recipe, total_steps, inner, phases, _held(recipe, model, phases), _switch(recipe, inner, layers, phases)
    )


def _check(
    recipe: Recipe, model: nn.Module, optimizer: torch.optim.Optimizer, layers: dict[str, SemiSparseLinear]
) -> None:
    """Raise ConfigError or LayerRefusedError unless recipe can start with this model and this optimizer."""
    check_optimizer(optimizer, layers)
    other = []
    for name, layer in layers_with_masks(model).items():
        if _pruning(layer.sparse_config) != _pruning(recipe.config):
            raise ConfigError(
                f"{name} was swapped with {layer.sparse_config!r}, but the recipe {recipe.name} has {recipe.config!r}: "
                "sparsify with recipe.config"
            )
        if layer.sparse_config != recipe.config:
            other.append(name)
    if other:
        logger.warning(
            "%d layers (%s, ...) were swapped with another grad_output or precision than the recipe %s has (%r, %r): "
            "they keep theirs",
            len(other), other[0], recipe.name, recipe.config.grad_output, recipe.config.precision,
        )  # fmt: skip
    if recipe.dense_range is not None and not isinstance(optimizer, StepAdamW):
        raise ConfigError(
            f"optimizer={type(optimizer).__name__} has no variance to freeze; the recipe {recipe.name} needs "
            "semisparse.recipes.StepAdamW"
        )
    if isinstance(optimizer, StepAdamW) and recipe.dense_range is not None and optimizer.variance_frozen:
        raise ConfigError("optimizer: its variance is already frozen; start with a new StepAdamW, then load its state")
    hooks = recipe.decay or recipe.dense_range is not None
    if hooks and optimizer in HOOKED:
        raise ConfigError(
            f"optimizer still has the hooks of the recipe {HOOKED[optimizer]}; call finish() of its schedule first"
        )
    if hooks or recipe.refresh_every > 1 or recipe.needs_scale:
        check_whole(layers)


def _pruning(config: SparseConfig) -> tuple[object, ...]:
    """What the layers of a recipe have in common with it."""
    return config.weight, config.activation, config.backend


def _held(recipe: Recipe, model: nn.Module, phases: tuple[Phase, ...]) -> Held | None:
    if recipe.needs_scale:
        return HeldScales(model)
    if recipe.refresh_every > 1:
        return HeldMasks(model, recipe.refresh_every, sparse=phases[0].kind == "sparse")
    return None


def _switch(
    recipe: Recipe,
    optimizer: torch.optim.Optimizer,
    layers: dict[str, SemiSparseLinear],
    phases: tuple[Phase, ...],
) -> AutoSwitch | None:
    if recipe.dense_range is None or not isinstance(optimizer, StepAdamW):
        return None
    low, total = recipe.dense_range[0], sum(phase.steps for phase in phases)
    weights = [layer.weight for layer in layers.values() if layer.weight.requires_grad]
    if not weights:
        raise ConfigError(
            f"the recipe {recipe.name} needs weights that train, but no sparse weight requires a gradient"
        )
    return AutoSwitch(optimizer, weights, (round(low * total), phases[0].steps))


def phases_of(recipe: Recipe, total_steps: int) -> tuple[Phase, ...]:
    """The phases of recipe; with dense_range those for the latest possible switch.

    Raises:
        ScheduleError: total_steps is not a number of steps, or too small.
    """
    if recipe.dense_range is None:
        return sparse_then_dense(total_steps, recipe.sparse_fraction)
    latest = share_of(total_steps, recipe.dense_range[1], "dense_range")
    if latest == 0:
        raise ScheduleError(
            f"total_steps={total_steps}: dense_range={recipe.dense_range} leaves no dense step, so there would be no "
            "variance to freeze; train longer or widen dense_range"
        )
    return dense_then_sparse(latest, total_steps)


def dense_then_sparse(at: int, total_steps: int) -> tuple[Phase, ...]:
    """Dense for the first `at` steps, sparse for the rest."""
    return Phase("dense", at), Phase("sparse", total_steps - at)
