"""Who else reads the memory of a parameter: ties, views and flat buffers."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy


def holders(model: nn.Module) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """(name, module, tensor) of every parameter and buffer of model, ties under each of their names."""
    for path, module in model.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                yield f"{path}.{name}" if path else name, module, tensor


def share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether writing into a can change b: the same tensor, or overlapping parts of one storage on one device."""
    if a is b:
        return True
    first, second = _span(a), _span(b)
    if first is None or second is None or a.device != b.device:
        return False
    return first[0] < second[1] and second[0] < first[1]


def _span(tensor: Tensor) -> tuple[int, int] | None:
    """First and last byte address of a strided tensor, or None where it has none (meta, fake, wrapper)."""
    if is_lazy(tensor) or tensor.is_meta or tensor.is_nested or tensor.layout is not torch.strided:
        return None
    if tensor.numel() == 0:
        return None
    try:
        start = tensor.data_ptr()
    except RuntimeError:
        return None
    if start == 0:
        return None
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * tensor.element_size()
