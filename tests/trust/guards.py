"""Guard zones: NaN on both sides of each buffer that Python allocates, looked at after the work is done."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

ZONE = 4096
"""Bytes before and behind a buffer; a multiple of what kernels expect of an address."""

NAN = 0xFF
"""This byte everywhere is NaN in fp32, fp16, bf16 and e4m3, and the largest number as an integer."""

_PLAIN = {"dtype", "device"}


class Guards:
    """Buffers with zones around them."""

    def __init__(self) -> None:
        self._memory: list[tuple[Tensor, int]] = []
        self._empty = torch.empty

    def __len__(self) -> int:
        return len(self._memory)

    def buffer(self, shape: Any, dtype: torch.dtype, device: Any) -> Tensor:
        """An uninitialised tensor, which reads as NaN, between two zones."""
        size = torch.Size(shape)
        count = size.numel() * dtype.itemsize
        memory = self._empty(count + 2 * ZONE, dtype=torch.uint8, device=device).fill_(NAN)
        self._memory.append((memory, count))
        strides = self._empty(size, device="meta").stride()
        made = self._empty(0, dtype=dtype, device=device)
        return made.set_(memory.untyped_storage(), ZONE // dtype.itemsize, size, strides)

    def copy(self, tensor: Tensor) -> Tensor:
        """The same numbers between two zones."""
        return self.buffer(tensor.shape, tensor.dtype, tensor.device).copy_(tensor)

    def torn(self) -> int:
        """Buffers whose zones were written to.

        They are counted for each device alone: a step on a GPU allocates on the CPU, too, and no operator takes both.
        """
        broken: dict[torch.device, list[Tensor]] = {}
        for memory, count in self._memory:
            torn = (memory[:ZONE] != NAN).any() | (memory[ZONE + count :] != NAN).any()
            broken.setdefault(memory.device, []).append(torn)
        return sum(int(torch.stack(ones).sum()) for ones in broken.values())


@contextmanager
def guarded() -> Iterator[Guards]:
    """torch.empty and Tensor.new_empty make guarded buffers inside the block."""
    guards, empty, new_empty = Guards(), torch.empty, torch.Tensor.new_empty

    def patched_empty(*shape: Any, **options: Any) -> Tensor:
        device = torch.device(options.get("device") or torch.get_default_device())
        if options.keys() - _PLAIN or device.type == "meta":  # which has no bytes
            return empty(*shape, **options)
        return guards.buffer(_shape(shape), options.get("dtype") or torch.get_default_dtype(), device)

    def patched_new_empty(self: Tensor, *shape: Any, **options: Any) -> Tensor:
        device = torch.device(options.get("device") or self.device)
        if options.keys() - _PLAIN or device.type == "meta":
            return new_empty(self, *shape, **options)
        return guards.buffer(_shape(shape), options.get("dtype") or self.dtype, device)

    with (
        mock.patch.object(torch, "empty", patched_empty),
        mock.patch.object(torch.Tensor, "new_empty", patched_new_empty),
    ):
        yield guards


def _shape(given: tuple[Any, ...]) -> tuple[int, ...]:
    return tuple(given[0]) if len(given) == 1 and not isinstance(given[0], int) else given
