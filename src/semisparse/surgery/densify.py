"""Making semi-sparse layers of a model dense again, in place, with a report.

Every check runs before the first change, so a call that raises leaves the model as it was.
"""

from typing import Literal, get_args

from torch import nn

from semisparse.arguments import check_module
from semisparse.errors import ConfigError, LayerRefusedError, NoLayerMatchedError
from semisparse.nn import SemiSparseBase
from semisparse.nn.refusals import bound_sparse
from semisparse.surgery.masked_weights import MaskedWeights
from semisparse.surgery.report import SWAPPED, LayerRow, SwapReport
from semisparse.surgery.selection import linear_layers

Weights = Literal["dense", "masked"]


def densify(model: nn.Module, weights: Weights = "dense") -> SwapReport:
    """Turn every semi-sparse layer of model back into the dense class it came from, in place.

    Args:
        model: A module with semi-sparse layers.
        weights: "dense" keeps the master weight (train sparse, finish dense). "masked" writes the pruned weight into
            the same Parameter, so that the dense layer computes what the sparse one did. Layers with a pruned
            activation keep their weight either way; the report says so.

    Returns:
        One row per layer that was changed.

    Raises:
        NoLayerMatchedError: model has no semi-sparse layer.
        LayerRefusedError: A layer is wrapped; or, for "masked", its weight is sharded, computed by a hook, or also
            used elsewhere in model (a tied embedding, an excluded layer, a layer with other settings), which the
            pruned weight would change.
        ConfigError: model is not a module, or weights has another value.
    """
    if weights not in get_args(Weights):
        raise ConfigError(f"weights={weights!r} is not one of {', '.join(map(repr, get_args(Weights)))}")
    check_module(model)
    layers = [found for found in linear_layers(model) if isinstance(found.layer, SemiSparseBase)]
    if not layers:
        raise NoLayerMatchedError(f"model={type(model).__name__} has no semi-sparse layer, so nothing would change")
    for found in layers:
        assert isinstance(found.layer, SemiSparseBase)
        if (reason := bound_sparse(found.layer)) is not None:
            raise LayerRefusedError(f"{found.name or '(root)'} has type {type(found.layer).__name__}: {reason}")
    masked = MaskedWeights(model, layers) if weights == "masked" else None
    if masked is not None:
        masked.write()
    rows: dict[int, LayerRow] = {}
    for found in layers:
        layer = found.layer
        if isinstance(layer, SemiSparseBase):  # a tied layer is dense already when its second name comes
            note = "dense weight kept" if masked is None else masked.note(layer)
            SemiSparseBase.to_dense(layer)
            rows[id(layer)] = LayerRow(found.name, layer.out_features, layer.in_features, SWAPPED, note)
    return SwapReport(tuple(rows.values()))
