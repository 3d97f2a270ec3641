"""The device that is looked at: one CUDA GPU, or the CPU standing in for it with the same calls."""

import ctypes
import gc
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from semisparse.gemm.autotune.autotuner import autotuner
from semisparse.gemm.engine import Engine, available, engine
from semisparse.gemm.problem import Problem
from tests.gemm import products, simulated

Product = tuple[Tensor, Tensor, Tensor, Tensor | None]
"""a (full matrix), b, out (NaN) and bias: small integers."""

WARM_UP = 3
"""Calls before a capture, on a stream of their own."""

TUNING_SECONDS = 0.1
"""Wall time per tuned problem here: that a right algorithm is chosen matters, and not which."""


class Machine:
    """A device with streams, graphs, memory and an engine.

    Args:
        device: A CUDA device, or "cpu", where streams are none, a replay is a call and the engine is simulated.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.cuda = device, device.type == "cuda"
        self.engine: Engine = engine() if self.cuda else simulated.make_engine()[0]
        self.index = device.index or 0 if self.cuda else -1

    @property
    def backend(self) -> Any:
        """Sparse products that may not fall back, where there are any."""
        if not self.cuda:
            return "auto"
        verdict = available(self.device)
        return "cusparselt" if verdict.ok else "dense"

    def why_not_sparse(self) -> str:
        """Why there are no sparse products; "" if there are."""
        verdict = self.engine.available(self.device)
        return "" if verdict.ok else verdict.reason

    def tune_quickly(self) -> None:
        """Let the autotuner take TUNING_SECONDS a problem in this process."""
        autotuner()._seconds = TUNING_SECONDS

    def wait(self) -> None:
        """For all work of the device."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def streams(self, count: int) -> Sequence[Callable[[], AbstractContextManager[Any]]]:
        """What makes new work go to one of count streams."""
        if not self.cuda:
            return [nullcontext] * count

        def on(stream: torch.cuda.Stream) -> Callable[[], AbstractContextManager[Any]]:
            return lambda: torch.cuda.stream(stream)

        return [on(torch.cuda.Stream(self.device)) for _ in range(count)]

    def capture(self, call: Callable[[], list[Tensor]]) -> tuple[list[Tensor], Callable[[], None]]:
        """A CUDA graph of a call.

        Args:
            call: What is recorded, after WARM_UP calls.

        Returns:
            The tensors that every replay writes, and the replay.
        """
        if not self.cuda:
            results = [one.clone() for one in call()]

            def again() -> None:
                for old, new in zip(results, call(), strict=True):
                    old.copy_(new)

            return results, again
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                call()
        torch.cuda.current_stream().wait_stream(side)
        self.wait()
        graph = torch.cuda.CUDAGraph()
        # A workspace that cuBLAS got in another graph's capture lies in that graph's memory; this one needs its own.
        torch._C._cuda_clearCublasWorkspaces()
        with torch.cuda.graph(graph):
            recorded = call()
        torch._C._cuda_clearCublasWorkspaces()
        return recorded, graph.replay

    def allocated(self) -> int:
        """Bytes that tensors hold on the GPU; 0 on the CPU."""
        gc.collect()
        self.wait()
        if not self.cuda:
            return 0
        # One for each pair of a stream and a handle of cuBLAS; PyTorch never frees them on its own.
        torch._C._cuda_clearCublasWorkspaces()
        return torch.cuda.memory_allocated(self.device)

    def resident(self) -> int:
        """Bytes of this process in main memory, after what is free has gone back to the system."""
        gc.collect()
        self.wait()
        if hasattr(library := ctypes.CDLL(None), "malloc_trim"):  # of glibc
            library.malloc_trim(0)
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def operands(self, problem: Problem, seed: int = 0) -> Product:
        """Small integers for a product."""
        if self.cuda:
            return products.whole(problem, seed)
        torch.manual_seed(seed)
        return simulated.operands(problem)


def differing(ours: Sequence[Tensor], expected: Sequence[Tensor]) -> Tensor:
    """How many results differ in a bit, as a number on the device: nothing waits."""
    wrong = [(_bits(one) != _bits(other)).any() for one, other in zip(ours, expected, strict=True)]
    return torch.stack(wrong).sum()


def _bits(tensor: Tensor) -> Tensor:
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().contiguous().view(kinds[tensor.itemsize])
