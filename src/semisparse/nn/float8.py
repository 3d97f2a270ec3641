"""torchao's Float8Linear beside semi-sparse layers: recognised, taken over, and noticed where it replaced one of ours.

torchao.float8.convert_to_float8_training replaces every nn.Linear that its filter lets through, semi-sparse layers too,
by a new module around the same Parameter. It is recognised by its name, because torchao need not be installed.
Source: torchao.float8.float8_linear and float8_linear_utils of torchao 0.18.
"""

from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

IS_FLOAT8 = (
    "torchao's Float8Linear multiplies in float8 already: convert it after sparsify, or pass take_float8=True to "
    "sparsify"
)
"""Why a Float8Linear stays as it is."""

LOST = (
    "torchao's conversion to float8 replaced it: pass module_filter_fn=semisparse.not_swapped to "
    "convert_to_float8_training, which leaves semi-sparse layers alone; take the layer back with "
    "sparsify(..., take_float8=True), or densify before converting"
)
"""What happened to a semi-sparse layer in whose place there is a Float8Linear."""

# What Float8Linear.__init__ adds to nn.Linear's attributes.
_ADDED = ("scaling_type_input", "scaling_type_weight", "scaling_type_grad_output", "config", "linear_mm_config")
# Weights of layers that were swapped and not made dense again. A replaced layer is gone, its Parameter is not.
_semi_sparse_weights = WeakTensorKeyDictionary()


def is_float8(layer: nn.Module) -> bool:
    """Whether layer is torchao's Float8Linear or of a class derived from it (FSDP derives one)."""
    return is_float8_class(type(layer))


def is_float8_class(cls: type) -> bool:
    """The same of a class."""
    return any(_is_its(base) for base in cls.__mro__)


def derived_float8(layer: nn.Module) -> str | None:
    """Why a Float8Linear cannot be taken over although that was asked for, by its class; None if it can."""
    if _is_its(type(layer)):
        return None
    return (
        f"its type {type(layer).__name__} is derived from torchao's Float8Linear, which alone can be taken over: call "
        "sparsify before wrapping with FSDP"
    )


def to_linear(layer: nn.Linear) -> None:
    """Make a Float8Linear the nn.Linear that it was made of, in place: same object, same Parameters, same hooks."""
    for name in _ADDED:
        layer.__dict__.pop(name, None)
    layer.__class__ = nn.Linear


def note_swapped(layer: nn.Linear, swapped: bool) -> None:
    """Remember that layer was made semi-sparse, or that it was made dense on purpose."""
    weight = layer._parameters.get("weight")
    if weight is None:
        return
    if swapped:
        _semi_sparse_weights[weight] = True
    else:
        _semi_sparse_weights.pop(weight, None)


def holds_semi_sparse_weight(layer: nn.Module) -> bool:
    """Whether layer holds the Parameter of a layer that was made semi-sparse and not dense again."""
    weight = layer._parameters.get("weight")
    return weight is not None and weight in _semi_sparse_weights


def _is_its(cls: type) -> bool:
    return cls.__name__ == "Float8Linear" and cls.__module__.partition(".")[0] == "torchao"
