"""Making a small model's step fast on a GPU: blocks compiled, forward and backward replayed from a CUDA graph.

A step of the examples is a few hundred short kernels, which the host cannot start as fast as a GPU runs them. The
optimizer stays outside the graph: recipes hook into it, and its host time passes while the GPU works.
"""

import gc
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn

from semisparse.errors import ConfigError
from semisparse.gemm.engine import engine
from semisparse_lab.models.transformer import Transformer
from semisparse_lab.tasks.task import Batch, Forward
from semisparse_lab.train.results import Kind

WARM_UP_STEPS = 3
"""Steps of each phase that run without a graph first, which compiles kernels and times algorithms."""


def compiled_blocks(model: nn.Module) -> Forward:
    """The forward of a Transformer with its blocks compiled; they share one compilation, and so do equal models.

    Sets dynamo's recompile limit for the whole process to 64, so that it may train with many masks, phases and batch
    sizes.

    Args:
        model: A Transformer.

    Raises:
        ConfigError: It is another model.
    """
    if not isinstance(model, Transformer):
        raise ConfigError(f"model={type(model).__name__} must be one of the lab's Transformers to compile its blocks")
    torch._dynamo.config.recompile_limit = 64
    blocks = [torch.compile(block, dynamic=False) for block in model.blocks]

    def forward(inputs: Tensor) -> Tensor:
        x = model.embed(inputs)
        for block in blocks:
            x = block(x)
        return model.read_out(x)

    return forward


@cache
def _side_stream(index: int) -> torch.cuda.Stream:
    """The stream on which steps run before a capture; one for all runs, because cuBLAS keeps a workspace for each."""
    return torch.cuda.Stream(index)


class GraphedGradients:
    """Loss and gradients of a batch, replayed from a CUDA graph that is captured anew in each phase.

    Gradients are overwritten by each call, not accumulated, and lie in the graph's memory; the loss is the graph's too,
    so read it before the next call. Calls up to WARM_UP_STEPS of a phase run without a graph, the next one is captured;
    every call computes its own batch.

    Args:
        backward: Computes the loss of a batch, runs its backward pass and returns the detached loss; all batches have
            one shape. Its random numbers must come from the device.
        parameters: Those whose gradients it makes.
    """

    def __init__(self, backward: Callable[[Batch], Tensor], parameters: list[nn.Parameter]) -> None:
        self._backward, self._parameters = backward, parameters
        self._kind: Kind | None = None
        self._seen = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._batch: Batch | None = None
        self._loss: Tensor | None = None
        self._products = 0
        self._side = _side_stream(torch.cuda.current_device())

    def __call__(self, batch: Batch, kind: Kind) -> tuple[Tensor, int]:
        """The loss, and the sparse products that this call started. kind: the phase that the batch is trained in."""
        if kind != self._kind:
            self._kind, self._seen, self._graph, self._loss = kind, 0, None, None
        if self._seen < WARM_UP_STEPS:
            self._seen += 1
            return self._without_graph(batch)
        if self._graph is None:
            self._capture(batch)
        assert self._graph is not None and self._batch is not None and self._loss is not None
        for static, value in zip(self._batch, batch, strict=True):
            if static.shape != value.shape:
                raise ConfigError(f"batch has shape {tuple(value.shape)}, the graph was captured with "
                                  f"{tuple(static.shape)}; make all batches equal")  # fmt: skip
            static.copy_(value)
        self._graph.replay()
        return self._loss, self._products

    def close(self) -> None:
        """Free the graph and its memory, the gradients included."""
        self._graph = self._batch = self._loss = None
        self._clear()
        del self._backward  # usually a method of an object that holds this one

    def _without_graph(self, batch: Batch) -> tuple[Tensor, int]:
        before = engine().products
        self._clear()
        self._side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side):
            loss = self._backward(batch)
        torch.cuda.current_stream().wait_stream(self._side)
        return loss, engine().products - before

    def _capture(self, batch: Batch) -> None:
        before = engine().products
        self._clear()
        self._batch = (batch[0].clone(), batch[1].clone())
        torch.cuda.synchronize()
        gc.collect()  # an older graph that is freed during the capture would break it
        graph = torch.cuda.CUDAGraph()
        # Compilers and data loaders of other threads may call CUDA meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._loss = self._backward(self._batch)
        self._graph, self._products = graph, engine().products - before

    def _clear(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None
