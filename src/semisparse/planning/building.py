"""One call of a layer as a training step makes it, forward and backward, for timing."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import count
from types import FunctionType
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semisparse import ops
from semisparse.config import SparseConfig
from semisparse.nn import PackedWeights, SemiSparseLinear
from semisparse.operands import as_tokens
from semisparse.planning.problems import DTYPES, LinearProblem
from semisparse.planning.timing import Call, Mode

Compile = Callable[[Callable[..., object]], Callable[..., object]]

compile_static: Compile = partial(torch.compile, dynamic=False)
"""torch.compile for one shape."""

_numbers = count()

_TOGETHER, _TOGETHER_BYTES = 8, 2**28
"""Weights of a layer's size that are packed together, where so many bytes are enough for them: the launch of a small
weight is shared with others, and a large one takes the GPU as long as alone."""


@dataclass(frozen=True)
class Built:
    """A layer that is ready to be timed.

    Attributes:
        layer: The layer.
        call: Its forward and backward.
        held: Bytes on the GPU that one forward leaves allocated for the backward, result included.
        packed: How its weight is packed per step; None if that is part of the call, or nothing is packed.
    """

    layer: nn.Linear
    call: Call
    held: Callable[[], int]
    packed: "PackedTogether | None" = None


@dataclass(frozen=True)
class PackedTogether:
    """Packing several weights alike in one launch, as packing per step does with those of a model.

    Attributes:
        weights: The owner of the packed weights, which lives as long as the layer's call is used.
        call: Packs all of them.
        count: How many there are.
        held: Bytes on the GPU that the packed weight of one layer takes.
    """

    weights: PackedWeights
    call: Call
    count: int
    held: int


class Bench:
    """The operands of one problem, shared by the layers of all candidates.

    In mode "compiled" a call is pointwise -> linear -> pointwise, compiled together, because that is where a compiler
    fuses a layer's casts and bias with its neighbours; `without_linear` is to be subtracted.

    Args:
        problem: What is timed.
        mode: How it is run.
        device: Where.
        compile: What compiles.
        per_step: Whether calls use weights that are packed beforehand, per step.
    """

    def __init__(
        self,
        problem: LinearProblem,
        mode: Mode,
        device: torch.device,
        compile: Compile = compile_static,
        per_step: bool = False,
    ) -> None:
        self.problem, self.mode, self.device, self._compile, self._per_step = problem, mode, device, compile, per_step
        self.dtype = DTYPES[problem.dtype]
        generator = torch.Generator(device).manual_seed(0)
        shape = problem.tokens, problem.in_features
        self._x = torch.randn(shape, device=device, generator=generator).to(DTYPES[problem.input_dtype])
        self._x.requires_grad_(problem.grad_input)
        self._dy = torch.randn(problem.tokens, problem.out_features, device=device, generator=generator).to(self.dtype)

    def build(self, config: SparseConfig | None) -> Built:
        """A layer of these settings, or nn.Linear for None, and its call.

        Args:
            config: Settings that prune the weight, if anything.

        Raises:
            SemiSparseError: There is no such layer.
            torch.OutOfMemoryError: It does not fit.
        """
        layer, packed = self._layer(config), None
        if isinstance(layer, SemiSparseLinear) and self._per_step:
            packed = self._packed(layer)
        forward = self._between_pointwise(layer) if self.mode == "compiled" else layer
        return Built(layer, self._call(forward, [self._x, *layer.parameters()]), lambda: self._held(forward), packed)

    def without_linear(self) -> Call:
        """The pointwise functions of mode "compiled" alone, forward and backward."""
        x, dh = self._x, torch.ones_like(self._x)
        y = self._dy.clone().requires_grad_(self._any_gradient)
        alone = self._compile(own_code(lambda x, y: (F.silu(x), F.silu(y))))

        def call() -> None:
            x.grad = y.grad = None
            with self._gradients():
                results = alone(x, y)
            assert isinstance(results, tuple)
            wanted = [index for index, result in enumerate(results) if result.requires_grad]
            if wanted:
                gradients = (dh, self._dy)
                torch.autograd.backward([results[i] for i in wanted], [gradients[i] for i in wanted])

        return call

    def cast(self) -> Call:
        """Rounding the input to e4m3, which layers that read the same input share."""
        x, columns = as_tokens(self._x).detach(), self.problem.grad_weight
        return lambda: ops.quantise(x, True, columns)

    def _layer(self, config: SparseConfig | None) -> nn.Linear:
        problem = self.problem
        sizes, weight_dtype = (problem.in_features, problem.out_features), DTYPES[problem.weight_dtype]
        layer: nn.Linear
        if config is None:
            layer = nn.Linear(*sizes, bias=problem.bias, device=self.device, dtype=weight_dtype)
        else:
            layer = SemiSparseLinear(*sizes, bias=problem.bias, device=self.device, dtype=weight_dtype, config=config)
            if config.grad_output is not None:
                layer.held_seed = torch.tensor(1, device=self.device)  # as a schedule sets it
        return layer.requires_grad_(problem.grad_weight)

    def _packed(self, layer: SemiSparseLinear) -> PackedTogether | None:
        """The weight of layer packed, together with others alike; None if this layer packs none."""
        size = layer.weight.numel() * layer.weight.element_size()
        count = max(1, min(_TOGETHER, _TOGETHER_BYTES // size))
        others = [self._layer(layer.sparse_config) for _ in range(count - 1)]
        weights = PackedWeights(nn.ModuleList([layer, *others]))

        def pack() -> None:
            with self._autocast():
                weights.pack()

        before = self._allocated()
        pack()
        if not weights.layers:
            return None
        return PackedTogether(weights, pack, count, (self._allocated() - before) // count)

    @property
    def _any_gradient(self) -> bool:
        return self.problem.grad_input or self.problem.grad_weight

    def _between_pointwise(self, layer: nn.Linear) -> Callable[..., object]:
        return self._compile(own_code(lambda x: F.silu(layer(F.silu(x)))))

    def _call(self, forward: Callable[..., object], tensors: list[Tensor]) -> Call:
        x, dy, backward = self._x, self._dy, self._any_gradient

        def call() -> None:
            for tensor in tensors:
                tensor.grad = None
            with self._autocast(), self._gradients():
                y = forward(x)
            if backward:
                torch.autograd.backward(y, dy)  # type: ignore[arg-type]

        return call

    def _held(self, forward: Callable[..., object]) -> int:
        before = self._allocated()
        with self._autocast(), self._gradients():
            y = forward(self._x)
        held = self._allocated() - before
        del y
        return held

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0

    def _gradients(self) -> AbstractContextManager[object]:
        return torch.set_grad_enabled(self._any_gradient)

    def _autocast(self) -> AbstractContextManager[object]:
        if self.problem.dtype == self.problem.weight_dtype:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)


def own_code(function: Callable[..., object]) -> FunctionType:
    """The function with a code object of its own: torch.compile limits how often it compiles one code object.

    Args:
        function: A plain function or lambda.
    """
    plain = cast(FunctionType, function)
    code = plain.__code__.replace(co_name=f"planned_{next(_numbers)}")
    return FunctionType(code, plain.__globals__, code.co_name, plain.__defaults__, plain.__closure__)
