"""The semi-sparse layers of a model, and whether they are still what they were."""

from collections.abc import Mapping

from torch import nn

from semisparse.nn import SemiSparseBase, SemiSparseLinear
from semisparse.nn.float8 import LOST, holds_semi_sparse_weight, is_float8
from semisparse.nn.refusals import weight_refusal
from semisparse.surgery.selection import plain_names


def semi_sparse_layers(model: nn.Module) -> dict[str, SemiSparseBase]:
    """The semi-sparse layers of a model by name; empty before sparsify and after densify.

    Args:
        model: Any module. A layer with two names is given once, under the first. Segments that wrappers insert
            (torch.compile, FSDP1, DistributedDataParallel) are left out of names.

    Raises:
        ConfigError: model is not a module.
    """
    return {name: module for name, module in plain_names(model).items() if isinstance(module, SemiSparseBase)}


def layers_with_masks(model: nn.Module) -> dict[str, SemiSparseLinear]:
    """The semi-sparse layers of model whose weight is pruned, named as in semi_sparse_layers; may be empty."""
    layers = semi_sparse_layers(model)
    return {name: layer for name, layer in layers.items() if isinstance(layer, SemiSparseLinear) and layer.has_mask}


def lost_to_float8(model: nn.Module) -> dict[str, nn.Linear]:
    """The Float8Linears of model that torchao put in the place of layers that sparsify had made semi-sparse, by name.

    A weight that a semi-sparse layer of model holds, too, is not lost: it is tied.
    """
    named = plain_names(model)
    kept = {id(module.weight) for module in named.values() if isinstance(module, SemiSparseBase)}
    return {
        name: module
        for name, module in named.items()
        if isinstance(module, nn.Linear)
        and is_float8(module)
        and holds_semi_sparse_weight(module)
        and id(module.weight) not in kept
    }


def changed_since(model: nn.Module, layers: Mapping[str, nn.Module]) -> tuple[str, str] | None:
    """The first layer that is no longer what sparsify made it, as (name, what happened to it); None if all still are.

    Args:
        model: The model.
        layers: Semi-sparse layers that it had, by name.
    """
    inside = {id(module) for module in model.modules()}
    lost = lost_to_float8(model)
    for name, layer in layers.items():
        if id(layer) not in inside and name in lost:
            reason = LOST
        elif id(layer) not in inside:
            reason = "it is no longer in the model: something (a conversion for QAT, say) replaced it"
        elif not isinstance(layer, SemiSparseBase):
            reason = f"it was made dense and is a {type(layer).__name__} now"
        else:
            reason = weight_refusal(layer) or ""
        if reason:
            return name or "(root)", reason
    return None
