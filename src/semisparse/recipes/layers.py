"""The layers that a recipe works on, and what it asks of the optimizer."""

from typing import Any

import torch
from torch import nn

from semisparse.errors import ConfigError, LayerRefused, NoLayerMatched
from semisparse.nn import SemiSparseLinear
from semisparse.swap import layers_with_masks


def layers_by_weight(model: nn.Module) -> dict[str, SemiSparseLinear]:
    """The layers by name, one for each weight: two modules may share a Parameter. Raises NoLayerMatched."""
    found: dict[int, tuple[str, SemiSparseLinear]] = {}
    for name, layer in layers_with_masks(model).items():
        found.setdefault(id(layer.weight), (name, layer))
    if not found:
        raise NoLayerMatched(f"model={type(model).__name__} has no SemiSparseLinear to train; call sparsify first")
    return dict(found.values())


def check_optimizer(optimizer: torch.optim.Optimizer, layers: dict[str, SemiSparseLinear]) -> None:
    """Raise ConfigError unless optimizer is a torch optimizer that holds the weights of all layers."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(
            f"optimizer={type(optimizer).__name__} is no torch.optim.Optimizer, so it has no step hook: pass the one "
            "that it wraps, or a subclass"
        )
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for name, layer in layers.items():
        if id(layer.weight) not in held:
            raise ConfigError(
                f"optimizer does not hold {name}.weight; build it with all weights of the semi-sparse layers"
            )


def check_whole(layers: dict[str, SemiSparseLinear]) -> None:
    """Raise LayerRefused where a weight is sharded or on no device, so that a recipe cannot look at all of it."""
    for name, layer in layers.items():
        if layer.weight.is_meta:
            raise LayerRefused(f"{name}.weight is on the meta device; materialise the model before the recipe starts")
        if hasattr(layer.weight, "full_tensor"):
            raise LayerRefused(f"{name}.weight is a sharded DTensor; this recipe must see whole weights: use dinov2")


def refuse_closure(user: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise ConfigError in a step hook of user that was given a closure, whose gradients do not exist yet."""
    if any(callable(value) for value in (*args[1:], kwargs.get("closure"))):
        raise ConfigError(f"optimizer.step(closure) computes gradients too late for {user}; step without closure")
