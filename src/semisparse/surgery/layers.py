"""The semi-sparse layers of a model, and whether they are still what they were."""

from collections.abc import Mapping

from torch import nn

from semisparse.nn import SemiSparseBase, SemiSparseLinear
from semisparse.nn.refusals import weight_refusal
from semisparse.surgery.selection import plain_names


def semi_sparse_layers(model: nn.Module) -> dict[str, SemiSparseBase]:
    """The semi-sparse layers of model by name, each once; names without the segments that wrappers insert."""
    return {name: module for name, module in plain_names(model).items() if isinstance(module, SemiSparseBase)}


def layers_with_masks(model: nn.Module) -> dict[str, SemiSparseLinear]:
    """The semi-sparse layers of model whose weight is pruned, named as in semi_sparse_layers; may be empty."""
    layers = semi_sparse_layers(model)
    return {name: layer for name, layer in layers.items() if isinstance(layer, SemiSparseLinear) and layer.has_mask}


def changed_since(model: nn.Module, layers: Mapping[str, nn.Module]) -> tuple[str, str] | None:
    """The first layer that is no longer what sparsify made it, as (name, what happened to it); None if all still are.

    Args:
        model: The model.
        layers: Semi-sparse layers that it had, by name.
    """
    inside = {id(module) for module in model.modules()}
    for name, layer in layers.items():
        if id(layer) not in inside:
            reason = "it is no longer in the model: something (a conversion to float8 or QAT, say) replaced it"
        elif not isinstance(layer, SemiSparseBase):
            reason = f"it was made dense and is a {type(layer).__name__} now"
        else:
            reason = weight_refusal(layer) or ""
        if reason:
            return name or "(root)", reason
    return None
