"""Which parameters and buffers share memory: ties, views and flat buffers."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

Holder = tuple[str, nn.Module, Tensor]
"""Name of a parameter or buffer, the module that holds it, and itself."""


def holders(model: nn.Module) -> Iterator[Holder]:
    """(name, module, tensor) of every parameter and buffer of model, ties under each of their names."""
    for path, module in model.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                yield f"{path}.{name}" if path else name, module, tensor


class Holders:
    """All parameters and buffers of a model, indexed by the memory that they occupy."""

    def __init__(self, model: nn.Module) -> None:
        self._same: dict[int, list[Holder]] = {}
        placed: list[tuple[str, int, int, Holder]] = []
        for holder in holders(model):
            tensor = holder[2]
            self._same.setdefault(id(tensor), []).append(holder)
            if (span := _span(tensor)) is not None:
                placed.append((str(tensor.device), *span, holder))
        self._heap: dict[int, list[Holder]] = {}
        heap: list[Holder] = []
        device, end = "", 0
        for where, start, stop, holder in sorted(placed, key=lambda place: place[:2]):
            if where != device or start >= end:  # overlaps nothing before it
                heap, device, end = [], where, stop
            heap.append(holder)
            end = max(end, stop)
            self._heap[id(holder[2])] = heap

    def of(self, tensor: Tensor) -> list[Holder]:
        """The holders of tensor, which must be one of the model's own, and of everything that shares memory with it."""
        near = self._heap.get(id(tensor), self._same.get(id(tensor), []))
        return [holder for holder in near if share_memory(holder[2], tensor)]


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
