"""Why a layer cannot be made semi-sparse, cannot stay so, or cannot be made dense again.

Only the layer itself is examined; surgery/refusals.py adds the reasons that follow from its place in a model.
"""

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from semisparse.nn.float8 import IS_FLOAT8, derived_float8, is_float8
from semisparse.nn.registry import OWN_ATTRIBUTES, is_registered
from semisparse.pattern import GROUP
from semisparse.reference.masks import FLOAT_DTYPES

_FLAT = (
    "its weight is part of a flat one between forwards, as torch's FullyShardedDataParallel (FSDP1) keeps it: use "
    "FSDP2 (torch.distributed.fsdp.fully_shard)"
)


def refusal(layer: nn.Linear, *, take_float8: bool = False) -> str | None:
    """Why layer cannot be made semi-sparse, as a message with the way out; None if it can.

    Args:
        layer: Any linear layer.
        take_float8: Whether torchao's Float8Linear counts as the nn.Linear that it was made of.
    """
    if is_float8(layer) and not take_float8:
        return IS_FLOAT8
    if isinstance(layer, nn.modules.lazy.LazyModuleMixin):
        return "it is lazy, without sizes yet: run one forward first, then swap"
    reason = weight_refusal(layer)
    if reason is not None:
        return reason
    if is_float8(layer):
        reason = derived_float8(layer)
        if reason is not None:
            return reason
    elif not is_registered(type(layer)):
        return (
            f"its type {type(layer).__name__} is a subclass of nn.Linear: if its forward is plain F.linear, "
            "call semisparse.register_linear on it; swap before wrapping with FSDP"
        )
    if "forward" in vars(layer):
        return (
            "its forward was replaced on the instance (as accelerate's hooks do), so the swapped forward would never "
            "run: swap before hooks are added, or remove them first"
        )
    if taken := sorted(name for name in OWN_ATTRIBUTES if name in vars(layer)):
        return f"it has attributes that semi-sparse layers use themselves: rename {', '.join(taken)}"
    if layer.in_features % GROUP or layer.out_features % GROUP:
        return (
            f"in_features={layer.in_features} and out_features={layer.out_features} must both be multiples of {GROUP}"
        )
    return None


def weight_refusal(layer: nn.Linear) -> str | None:
    """Why the current weight of layer cannot be pruned, or None if it can; also for layers that are semi-sparse."""
    if parametrize.is_parametrized(layer):
        return "it is parametrised: call torch.nn.utils.parametrize.remove_parametrizations first"
    if "weight" not in layer._parameters:
        if not any(name.startswith("weight") for name in layer._parameters):  # a computed one is made of others there
            return _FLAT
        return "its weight is computed by a hook (weight_norm, spectral_norm or pruning): remove that first"
    weight = layer.weight
    if weight is None:
        return "it has no weight"
    if not _is_plain(weight):
        return (
            f"its weight is a {type(weight).__name__}, a tensor subclass with products of its own (quantised, say): "
            "swap before converting, or leave this layer to the other library"
        )
    if weight.layout is not torch.strided:
        return f"its weight has the layout {weight.layout}; make it dense first (weight.to_dense())"
    if weight.dim() == 1 and weight.numel():
        return _FLAT
    shape = (layer.out_features, layer.in_features)
    if weight.numel() and tuple(weight.shape) != shape:  # under DeepSpeed's ZeRO-3 it is empty between forwards
        return f"its weight has shape {tuple(weight.shape)}, not {shape}"
    if weight.dtype not in FLOAT_DTYPES:
        return f"its weight has dtype {weight.dtype}; use float64, float32, float16 or bfloat16"
    return None


def bound_sparse(layer: nn.Linear) -> str | None:
    """Why a semi-sparse layer cannot be made dense in place now, or None if it can."""
    if "operand" not in vars(type(layer)):  # the layer classes themselves define it, wrappers' subclasses do not
        return (
            "it is a wrapper around a semi-sparse layer: unwrap it first, or end with a dense phase of a "
            "SparseSchedule, which needs no swap"
        )
    if "forward" in vars(layer):
        return (
            "its forward was replaced on the instance (as accelerate's hooks do) and would go on calling the "
            "sparse one: remove those hooks first"
        )
    return None


def _is_plain(weight: Tensor) -> bool:
    """Whether weight is a plain tensor, a sharded one (FSDP gathers it for the forward), or a fake one."""
    return (
        type(weight) in (nn.Parameter, Tensor)
        or hasattr(weight, "full_tensor")
        or isinstance(weight, torch._subclasses.FakeTensor)
    )
