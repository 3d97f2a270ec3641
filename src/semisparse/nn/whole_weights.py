"""Which weights can be packed between forwards: those that are whole then, and show that they were written to."""

import sys

import torch
from torch import Tensor, nn

from semisparse.nn.packed_weight import PackingLayer


def why_not_whole(layer: PackingLayer) -> str:
    """Why the weight of layer cannot be packed before the forward that uses it, in words; empty where it can."""
    weight = layer._parameters.get("weight")
    if weight is None:
        return "its weight is computed at each forward (by a parametrisation or a hook)"
    if hasattr(weight, "full_tensor"):
        return "its weight is sharded (a DTensor), and between forwards this rank has only its part"
    if type(weight) not in (nn.Parameter, Tensor):
        return f"its weight is a {type(weight).__name__}, not a plain Parameter"
    if weight.is_inference():
        return "its weight was made under torch.inference_mode and does not tell that it was written to"
    if tuple(weight.shape) != (layer.out_features, layer.in_features) or not (weight.is_meta or weight.data_ptr()):
        return "its weight is not in memory between forwards (sharded or offloaded)"
    return ""


def managed_by_fsdp(model: nn.Module) -> bool:
    """Whether FSDP2 manages parts of model: its gathered weights are plain, but show no version when they change."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    kind = getattr(fsdp, "FSDPModule", None)
    return kind is not None and any(isinstance(module, kind) for module in model.modules())


def plain_call(weight: Tensor) -> bool:
    """Whether this call may write to buffers that later calls use: no mode, transform or CUDA graph records it."""
    return (
        not torch._C._len_torch_dispatch_stack()
        and torch._C._functorch.maybe_current_level() is None
        and not capturing(weight)
    )


def capturing(weight: Tensor) -> bool:
    """Whether a CUDA graph is captured on the current stream of the weight's device."""
    return weight.is_cuda and torch.cuda.is_current_stream_capturing()
