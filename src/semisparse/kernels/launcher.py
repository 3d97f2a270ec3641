"""Low-overhead repeated launches of a Triton kernel.

Triton inspects every argument of every launch to find the compiled kernel that fits, which takes longer than a small
kernel runs (64 us of 77 us for a whole pack op, measured on one NVIDIA H200). Where sizes and constants repeat, as they
do from step to step, the kernel found at the first launch fits again if the addresses are aligned as they were then.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from semisparse.formats.layout import ALIGNMENT
from semisparse.kernels.compiled import CompiledLaunch, compiled_launch
from semisparse.kernels.grid import check_grid


class Launcher:
    """A Triton kernel whose grid, sizes and constants are fixed; only the addresses change from call to call.

    Args:
        kernel: Takes the pointers, then sizes, then constants, in this order. Dtypes of the pointers, and which of them
            are None, must be the same at every call.
        grid: Programs along x, y and z.
        sizes: Run-time integers.
        constants: Compile-time constants.
        **options: Triton's own (num_warps, ...).

    Raises:
        ShapeError: CUDA cannot start such a grid.
    """

    __slots__ = (
        "_compiled",
        "_constants",
        "_described",
        "_given",
        "_grid",
        "_kernel",
        "_options",
        "_sizes",
        "_started",
    )

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, int, int],
        sizes: tuple[int, ...],
        constants: tuple[Any, ...],
        **options: Any,
    ) -> None:
        check_grid(grid)
        self._kernel, self._grid, self._sizes, self._constants = kernel, grid, sizes, constants
        self._options = options
        self._given: tuple[bool, ...] | None = None
        self._started: dict[int, Callable[..., None]] = {}
        self._compiled: dict[int, Any] = {}
        self._described: dict[int, CompiledLaunch | str] = {}

    def __call__(self, index: int, *pointers: Tensor | None) -> None:
        """Launch on the current stream of CUDA device index; -1 runs Triton's interpreter on the CPU."""
        if index < 0:
            self._launch(*pointers)
            return
        previous = torch._C._cuda_getDevice()
        if previous == index:
            self._start(index, pointers)
            return
        torch._C._cuda_exchangeDevice(index)
        try:
            self._start(index, pointers)
        finally:
            torch._C._cuda_exchangeDevice(previous)

    def compiled(self, index: int, *pointers: Tensor | None) -> CompiledLaunch | str:
        """How the kernel is started without Triton on a device where it was launched with aligned addresses.

        Args:
            index: Of the CUDA device.
            *pointers: As at a call; only which of them are None matters.

        Returns:
            The launch, or why only Triton can start it.
        """
        kernel = self._compiled.get(index)
        if kernel is None:
            return "it was not launched with aligned addresses yet"
        found = self._described.get(index)
        if found is None:
            found = self._described[index] = compiled_launch(kernel, self._grid, pointers, self._sizes)
        return found

    def _start(self, index: int, pointers: tuple[Tensor | None, ...]) -> None:
        bits = 0
        for tensor in pointers:
            if tensor is not None:
                bits |= tensor.data_ptr()
        if bits % ALIGNMENT:  # Triton compiles one kernel for aligned addresses and another for all others
            self._launch(*pointers)
        elif start := self._started.get(index):
            stream = torch._C._cuda_getCurrentRawStream(index)
            start(*pointers, *self._sizes, *self._constants, stream=stream)
        else:
            self._compiled[index] = compiled = self._launch(*pointers)
            self._started[index] = compiled[self._grid]

    def _launch(self, *pointers: Tensor | None) -> Any:
        given = tuple(pointer is not None for pointer in pointers)
        if self._given not in (None, given):  # seen by every launch of the interpreter, and so by tests on a CPU
            raise AssertionError(f"pointers given were {self._given} and are {given}: prepare one launcher for each")
        self._given = given
        return self._kernel[self._grid](*pointers, *self._sizes, *self._constants, **self._options)
