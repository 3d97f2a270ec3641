"""GPT-2's Conv1D as nn.Linear and back: the same layer with its weight transposed, in place, bit for bit.

transformers' Conv1D(nf, nx) stores weight as (nx x nf) and computes y = x W + b, so sparsify does not see it. It is
recognised by its name, because transformers need not be installed. Source: transformers.pytorch_utils.Conv1D.

Every check runs before the first change, so a call that raises leaves the model as it was.
"""

from collections.abc import Iterable

from torch import nn
from torch.nn.utils import parametrize

from semisparse.arguments import check_module
from semisparse.errors import ConfigError, LayerRefusedError, NoLayerMatchedError
from semisparse.nn import SemiSparseBase
from semisparse.surgery.transpose import transpose_refusal, transpose_weights

_ORIGIN = "_conv1d_class"  # of a converted layer: the class it came from
_SIZES = ("in_features", "out_features")


def conv1d_to_linear(
    model: nn.Module, classes: type[nn.Module] | Iterable[type[nn.Module]] = ()
) -> tuple[str, ...]:  # fmt: skip
    """Turn every Conv1D of model (the root too) into an nn.Linear, in place.

    The module object, its hooks, training flag and attributes stay, and so does the Parameter object: its data becomes
    the transpose (N x K, contiguous, same values, dtype and device; also on meta), and so does its .grad. Outputs are
    equal up to the order of summation. linear_to_conv1d is the exact reverse, also after sparsify and densify.

    Convert before the first optimizer step: optimizers built before stay valid only as long as they hold no state.
    Momenta of an earlier step keep the old shape, and for a square weight no optimizer notices. State_dict keys stay
    and shapes are transposed, and a square weight of an old checkpoint would load without an error: load before
    converting, and call linear_to_conv1d before save_pretrained or before saving for others.

    Args:
        model: Any module.
        classes: Further classes to convert. By naming one you state that it has weight (K x N) and bias (N,) or None,
            and computes x W + b and nothing else. Only layers of exactly such a class are converted.

    Returns:
        The names of the layers.

    Raises:
        NoLayerMatchedError: There is nothing to convert.
        LayerRefusedError: A Conv1D cannot be converted: a subclass; a parametrised, hooked, sharded or otherwise
            special weight; a weight tied to another kind of layer, or held by a live graph or DDP; a replaced forward.
        ConfigError: model is not a module, or classes holds something else than classes of modules.
    """
    known = _as_classes(classes)
    layers = {}
    for name, layer, parent in _modules_of(model):
        family = [cls for cls in type(layer).__mro__ if cls in known or is_conv1d(cls)]
        if family:
            _refuse(name, layer, _no_conv1d(layer, family[0]) or transpose_refusal(layer, parent))
            layers[name] = layer
    if not layers:
        raise NoLayerMatchedError(
            f"model={type(model).__name__} has no Conv1D of transformers{' and none of classes' if known else ''}, so "
            "nothing would change; pass classes= for your own layer with a weight of K x N"
        )
    transpose_weights(model, layers)
    for layer in layers.values():
        weight = layer._parameters["weight"]
        assert weight is not None  # transpose_refusal has checked
        vars(layer).update({_ORIGIN: type(layer), "in_features": weight.shape[1], "out_features": weight.shape[0]})
        layer.__class__ = nn.Linear  # keeps outside references and hooks valid
    return tuple(layers)


def linear_to_conv1d(model: nn.Module) -> tuple[str, ...]:
    """Turn every layer that conv1d_to_linear converted back to its class, in place.

    Class, attributes and the shape of the weight (K x N, contiguous) are those from before, values are the current ones
    bit for bit; Parameter objects, optimizers and state_dicts as in conv1d_to_linear.

    Args:
        model: A module with converted layers.

    Returns:
        The names of the layers.

    Raises:
        NoLayerMatchedError: model has no converted layer.
        LayerRefusedError: A converted layer is still semi-sparse (call semisparse.densify first), was wrapped since, or
            has a weight that cannot be transposed.
    """
    layers = {}
    for name, layer, parent in _modules_of(model):
        if _ORIGIN in vars(layer):
            _refuse(name, layer, _no_linear(layer) or transpose_refusal(layer, parent))
            layers[name] = layer
    if not layers:
        raise NoLayerMatchedError(
            f"model={type(model).__name__} has no layer that conv1d_to_linear converted, so nothing would change"
        )
    transpose_weights(model, layers)
    for layer in layers.values():
        layer.__class__ = vars(layer)[_ORIGIN]
        for key in (_ORIGIN, *_SIZES):
            del vars(layer)[key]
    return tuple(layers)


def is_conv1d(cls: type) -> bool:
    """Whether cls is the Conv1D of transformers (any version); a subclass is not."""
    return cls.__name__ == "Conv1D" and cls.__module__.partition(".")[0] == "transformers"


def _as_classes(classes: object) -> tuple[type[nn.Module], ...]:
    given = tuple(classes) if isinstance(classes, Iterable) else (classes,)
    for cls in given:
        if not (isinstance(cls, type) and issubclass(cls, nn.Module)) or issubclass(cls, nn.Linear):
            raise ConfigError(f"classes={classes!r}: {cls!r} must be a subclass of nn.Module and not of nn.Linear")
    return given


def _modules_of(model: nn.Module) -> list[tuple[str, nn.Module, nn.Module | None]]:
    """Name, module and parent of every module; tied ones once."""
    check_module(model)
    modules = dict(model.named_modules())
    return [(name, module, modules[name.rpartition(".")[0]] if name else None) for name, module in modules.items()]


def _refuse(name: str, layer: nn.Module, reason: str | None) -> None:
    if reason is not None:
        raise LayerRefusedError(f"{name or '(root)'} ({type(layer).__name__}) cannot be converted: {reason}")


def _no_conv1d(layer: nn.Module, cls: type) -> str | None:
    """Why layer, an instance of the known class cls, is not simply x W + b, or None."""
    if type(layer) is not cls and not parametrize.is_parametrized(layer):
        return (
            f"it is a subclass of {cls.__name__}: pass its own class in classes= if its forward is x W + b, and "
            "convert before wrapping with FSDP"
        )
    if any(key in vars(layer) for key in _SIZES):
        return "it has in_features or out_features of its own, which nn.Linear would overwrite: rename them"
    weight = layer._parameters.get("weight")
    sizes = getattr(layer, "nx", None), getattr(layer, "nf", None)
    if weight is not None and None not in sizes and weight.shape != sizes:
        return f"its weight has shape {tuple(weight.shape)}, not (nx, nf)={sizes}: it is sharded, quantised or pruned"
    return None


def _no_linear(layer: nn.Module) -> str | None:
    """Why a converted layer cannot be turned back, or None."""
    if isinstance(layer, SemiSparseBase):
        return "it is still semi-sparse: call semisparse.densify first"
    if type(layer) is not nn.Linear and not parametrize.is_parametrized(layer):
        return "its class was changed since: unwrap it first, or convert an unwrapped model that loads its state_dict"
    weight = layer._parameters.get("weight")
    sizes = tuple(getattr(layer, key) for key in reversed(_SIZES))
    if weight is not None and (
        weight.shape != sizes or (getattr(layer, "nf", sizes[0]), getattr(layer, "nx", sizes[1])) != sizes
    ):
        return f"its weight has shape {tuple(weight.shape)}, not {sizes} as converted: it was sharded or resized since"
    return None
