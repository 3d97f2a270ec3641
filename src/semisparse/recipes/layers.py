"""The layers that a recipe trains, and what it requires of the optimizer."""

from typing import Any

import torch
from torch import nn

from semisparse.errors import ConfigError, LayerRefusedError, NoLayerMatchedError
from semisparse.nn import SemiSparseLinear
from semisparse.surgery.layers import layers_with_masks


def layers_by_weight(model: nn.Module) -> dict[str, SemiSparseLinear]:
    """The SemiSparseLinear layers of model by name, one per weight: two layers may share a Parameter.

    Raises:
        NoLayerMatchedError: model has none.
    """
    found: dict[int, tuple[str, SemiSparseLinear]] = {}
    for name, layer in layers_with_masks(model).items():
        found.setdefault(id(layer.weight), (name, layer))
    if not found:
        raise NoLayerMatchedError(f"model={type(model).__name__} has no SemiSparseLinear to train; call sparsify first")
    return dict(found.values())


def unwrapped(optimizer: Any) -> Any:
    """The torch optimizer that really steps: optimizer itself, or the one inside a wrapper such as accelerate's.

    A wrapper lacks an optimizer's own hooks and has exactly one optimizer as an attribute, perhaps itself a wrapper.

    Raises:
        ConfigError: optimizer is neither an optimizer nor such a wrapper.
    """
    seen: set[int] = set()
    while not _has_hooks(optimizer):
        seen.add(id(optimizer))
        values = [value for value in _attributes(optimizer) if isinstance(value, torch.optim.Optimizer)]
        inside = {id(value): value for value in values if id(value) not in seen}
        if len(inside) != 1:
            raise ConfigError(
                f"optimizer={type(optimizer).__name__} is not a torch.optim.Optimizer with step hooks and wraps "
                f"{len(inside)} of them: pass the one that steps, or a subclass"
            )
        optimizer = next(iter(inside.values()))
    return optimizer


def _has_hooks(optimizer: Any) -> bool:
    return isinstance(optimizer, torch.optim.Optimizer) and "_optimizer_step_pre_hooks" in vars(optimizer)


def _attributes(wrapper: Any) -> list[Any]:
    return list(getattr(wrapper, "__dict__", {}).values())


def check_optimizer(optimizer: torch.optim.Optimizer, layers: dict[str, SemiSparseLinear]) -> None:
    """Raise ConfigError unless optimizer holds the weight of each layer that requires a gradient."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for name, layer in layers.items():
        if layer.weight.requires_grad and id(layer.weight) not in held:
            raise ConfigError(
                f"optimizer does not hold {name}.weight; build it with all weights of the semi-sparse layers that "
                "train, or freeze this one (requires_grad_(False))"
            )


def check_whole(layers: dict[str, SemiSparseLinear]) -> None:
    """Raise LayerRefusedError if a weight is sharded or on the meta device, so that a recipe cannot read all of it."""
    for name, layer in layers.items():
        if layer.weight.is_meta:
            raise LayerRefusedError(
                f"{name}.weight is on the meta device; materialise the model before the recipe starts"
            )
        if hasattr(layer.weight, "full_tensor"):
            raise LayerRefusedError(
                f"{name}.weight is a sharded DTensor; this recipe must see whole weights: use dinov2"
            )


def refuse_closure(user: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise ConfigError in an optimizer's step hook if the step has a closure: its gradients do not exist yet.

    Args:
        user: Class whose hook it is, for the message.
        args: Positional arguments of the step, the optimizer first.
        kwargs: Keyword arguments of the step.
    """
    if any(callable(value) for value in (*args[1:], kwargs.get("closure"))):
        raise ConfigError(f"optimizer.step(closure) computes gradients too late for {user}; step without closure")
