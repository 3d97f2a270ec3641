"""GPT-2's Conv1D as nn.Linear and back: the same layer with its weight transposed, in place, bit for bit.

transformers' Conv1D(nf, nx) stores weight as (nx x nf) and computes y = x W + b, so sparsify does not see it. It is
recognised by its name, because transformers need not be installed. Source: transformers.pytorch_utils.Conv1D.

Every check runs before the first change, so a call that raises leaves the model as it was.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from semisparse.arguments import check_module
from semisparse.errors import ConfigError, LayerRefusedError, NoLayerMatchedError
from semisparse.nn import SemiSparseBase

_ORIGIN = "_conv1d_class"  # of a converted layer: the class it came from
_SIZES = ("in_features", "out_features")


def conv1d_to_linear(
    model: nn.Module, classes: type[nn.Module] | Iterable[type[nn.Module]] = ()
) -> tuple[str, ...]:  # fmt: skip
    """Turn every Conv1D of model (the root too) into an nn.Linear, in place; returns the names of the layers.

    classes: further classes to convert. By naming one you state that it has weight (K x N) and bias (N,) or None, and
    computes x W + b and nothing else. Only layers of exactly such a class are converted.

    The module object, its hooks, training flag and attributes stay, and so does the Parameter object: its data becomes
    the transpose (N x K, contiguous, same values, dtype and device; also on meta), its .grad likewise. Outputs are
    equal up to the order of summation. linear_to_conv1d is the exact reverse, also after sparsify and densify.

    Optimizers built before stay valid as long as they hold no state: momenta of an earlier step keep the old shape,
    and for a square weight no optimizer notices. So convert before the first step. State_dict keys stay, shapes are
    transposed, and a square weight of an old checkpoint would load without an error: load before converting, and call
    linear_to_conv1d before save_pretrained or before saving for others.

    Raises NoLayerMatchedError when there is nothing to convert; LayerRefusedError, with the reason, when a Conv1D
    cannot be converted (a subclass, a parametrised, hooked, sharded or otherwise special weight, a weight tied to
    another kind of layer, a replaced forward, a weight that a live graph or DDP holds); ConfigError for other models or
    classes.
    """
    known = _as_classes(classes)
    layers = {}
    for name, layer, parent in _modules_of(model):
        family = [cls for cls in type(layer).__mro__ if cls in known or is_conv1d(cls)]
        if family:
            _refuse(name, layer, _no_conv1d(layer, family[0]) or _fixed_weight(layer, parent))
            layers[name] = layer
    if not layers:
        raise NoLayerMatchedError(
            f"model={type(model).__name__} has no Conv1D of transformers{' and none of classes' if known else ''}, so "
            "nothing would change; pass classes= for your own layer with a weight of K x N"
        )
    _turn_weights(model, layers)
    for layer in layers.values():
        weight = layer._parameters["weight"]
        assert weight is not None  # _fixed_weight has looked
        vars(layer).update({_ORIGIN: type(layer), "in_features": weight.shape[1], "out_features": weight.shape[0]})
        layer.__class__ = nn.Linear  # keeps outside references and hooks valid
    return tuple(layers)


def linear_to_conv1d(model: nn.Module) -> tuple[str, ...]:
    """Turn every layer that conv1d_to_linear converted back to its class, in place; returns the names of the layers.

    Class, attributes and the shape of the weight (K x N, contiguous) are those from before, values the current ones bit
    for bit; Parameter objects, optimizers and state_dicts as in conv1d_to_linear.
    Raises NoLayerMatchedError when model has no converted layer; LayerRefusedError, with the reason, when one is still
    semi-sparse (call semisparse.densify first), was wrapped since, or has a weight that cannot be transposed.
    """
    layers = {}
    for name, layer, parent in _modules_of(model):
        if _ORIGIN in vars(layer):
            _refuse(name, layer, _no_linear(layer) or _fixed_weight(layer, parent))
            layers[name] = layer
    if not layers:
        raise NoLayerMatchedError(
            f"model={type(model).__name__} has no layer that conv1d_to_linear converted, so nothing would change"
        )
    _turn_weights(model, layers)
    for layer in layers.values():
        layer.__class__ = vars(layer)[_ORIGIN]
        for key in (_ORIGIN, *_SIZES):
            del vars(layer)[key]
    return tuple(layers)


def is_conv1d(cls: type) -> bool:
    """Whether cls is the Conv1D of transformers (of any of its versions); subclasses are not."""
    return cls.__name__ == "Conv1D" and cls.__module__.partition(".")[0] == "transformers"


def _as_classes(classes: object) -> tuple[type[nn.Module], ...]:
    given = tuple(classes) if isinstance(classes, Iterable) else (classes,)
    for cls in given:
        if not (isinstance(cls, type) and issubclass(cls, nn.Module)) or issubclass(cls, nn.Linear):
            raise ConfigError(f"classes={classes!r}: {cls!r} must be a subclass of nn.Module and not of nn.Linear")
    return given


def _modules_of(model: nn.Module) -> list[tuple[str, nn.Module, nn.Module | None]]:
    """Name, module and parent of every module, tied ones once."""
    check_module(model)
    modules = dict(model.named_modules())
    return [(name, module, modules[name.rpartition(".")[0]] if name else None) for name, module in modules.items()]


def _refuse(name: str, layer: nn.Module, reason: str | None) -> None:
    if reason is not None:
        raise LayerRefusedError(f"{name or '(root)'} ({type(layer).__name__}) cannot be converted: {reason}")


def _no_conv1d(layer: nn.Module, cls: type) -> str | None:
    """Why layer, an instance of the known class cls, is not simply x W + b; None when it is."""
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
    """Why layer, once converted, cannot go back; None when it can."""
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


def _fixed_weight(layer: nn.Module, parent: nn.Module | None) -> str | None:
    """Why the weight of layer cannot be transposed in place, whichever way; None when it can."""
    if parametrize.is_parametrized(layer):
        return "it is parametrised: call torch.nn.utils.parametrize.remove_parametrizations first"
    weight = layer._parameters.get("weight")
    if weight is None:
        return (
            "its weight is not a Parameter, but computed by a hook (weight_norm, pruning) or flattened: undo that first"
        )
    if hasattr(weight, "full_tensor"):
        return "its weight is a sharded DTensor: convert before sharding"
    if type(weight) is not nn.Parameter or weight.is_inference():
        kind = "an inference tensor" if weight.is_inference() else f"a {type(weight).__name__}"
        return f"its weight is {kind}: convert while it is a plain nn.Parameter"
    n = weight.shape[0 if isinstance(layer, nn.Linear) else -1] if weight.dim() == 2 else None
    bias = layer._parameters.get("bias")
    if n is None or "bias" not in layer._parameters or (bias is not None and bias.shape != (n,)):
        return "it needs a 2-D weight and the bias that fits it, or register_parameter('bias', None)"
    if "forward" in vars(layer):
        return "its forward was replaced on the instance (accelerate does that): remove that first"
    if hasattr(parent, "fan_in_fan_out"):  # peft's name for a weight of K x N
        return f"the adapter {type(parent).__name__} around it relies on the shape of its weight: convert without it"
    if weight._backward_hooks or getattr(weight, "_post_accumulate_grad_hooks", None):
        return "its weight has gradient hooks, which would meet another shape: register them after converting"
    if _in_a_graph(weight):
        return (
            "a graph still holds its weight in the old shape: delete the outputs and losses of earlier forwards (del "
            "loss), and convert before wrapping with DistributedDataParallel"
        )
    return None


def _in_a_graph(weight: Tensor) -> bool:
    """Whether weight's AccumulateGrad node is alive; it remembers the shape, and DDP has its hooks there.

    A node that only this function asks for dies at once, and what was noted on it too.
    """
    if not weight.requires_grad:
        return False
    with torch.inference_mode(False):
        notes: Any = torch.autograd.graph.get_gradient_edge(weight).node.metadata
        notes[_ORIGIN] = True
        node = torch.autograd.graph.get_gradient_edge(weight).node
    notes = node.metadata
    return notes.pop(_ORIGIN, False)


def _turn_weights(model: nn.Module, layers: dict[str, nn.Module]) -> None:
    """Transpose the weights of layers, each once; all or, on an error, none of them."""
    weights = {id(weight): weight for layer in layers.values() if (weight := layer._parameters["weight"]) is not None}
    _check_ties(model, layers)
    turned = []
    try:
        for weight in weights.values():
            _turn(weight)
            turned.append(weight)
    except BaseException:  # no memory for another transpose, say, or Ctrl-C
        for weight in turned:
            _turn(weight)
        raise


def _check_ties(model: nn.Module, layers: dict[str, nn.Module]) -> None:
    """Raise LayerRefusedError when a weight of layers is, or shares memory with, anything else but such a weight."""
    turned = {id(layer) for layer in layers.values()}
    homes: dict[int, list[tuple[str, int, bool]]] = {}  # memory -> the tensors there: name, identity, to be turned
    for owner, module, _ in _modules_of(model):
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided:
                memory = tensor.untyped_storage().data_ptr() or id(tensor)  # 0: on meta, or empty
                known = key == "weight" and id(module) in turned
                homes.setdefault(memory, []).append((f"{owner}.{key}".strip("."), id(tensor), known))
    for tensors in homes.values():
        weight, identity, _ = next((home for home in tensors if home[2]), ("", 0, False))
        other = next((name for name, tensor, known in tensors if not known or tensor != identity), None)
        if weight and other:
            raise LayerRefusedError(
                f"{weight} and {other} share their values, and {other} must keep its shape: untie them first (give one "
                "a clone)"
            )


@torch.no_grad()
def _turn(weight: Tensor) -> None:
    """Transpose weight and its gradient, both contiguous afterwards; the Parameter object stays."""
    with torch.inference_mode(False):
        turned, grad = weight.t().contiguous(), None if weight.grad is None else weight.grad.t().contiguous()
        weight.grad = None
        weight.data = turned
        weight.grad = grad
        torch.autograd.graph.increment_version(weight)  # a backward that had saved the old values raises
