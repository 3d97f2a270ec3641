"""The autograd functions, and in them the only gradient formulas of the package (written out in functional.py).

Their operands are checked and converted by functional.py; none of them is public.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from semisparse import ops
from semisparse.cpu_ops import ROW_WISE


class _Given:
    """Arguments as they were passed."""

    __slots__ = ("args", "kwargs")

    def __init__(self, args: tuple[Any, ...]) -> None:
        self.args, self.kwargs = args, dict[str, Any]()

    def apply_defaults(self) -> None:
        """There are none."""


class _AllGiven(inspect.Signature):
    """Signature of a function that is always called with all its arguments, by position."""

    __slots__ = ()

    def bind(self, /, *args: Any, **kwargs: Any) -> _Given:  # type: ignore[override]
        return _Given(args)


def _signed(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Spare the calls of an autograd function most of their host time.

    PyTorch inspects the signature of forward and binds the arguments at every call. That was some 130 of the 400 Python
    calls of a whole training step of one layer (counted on a CPU); with this signature it takes five.
    """
    signature = _AllGiven([*inspect.signature(forward).parameters.values()])
    forward.__signature__ = signature  # type: ignore[attr-defined]
    return forward


class PruneWeight(torch.autograd.Function):
    """W -> W~ in the compute dtype; the gradient reaches W unchanged, in W's dtype."""

    @staticmethod
    @_signed
    def forward(weight: Tensor, dtype: torch.dtype, mask: str, frozen: Tensor | None) -> Tensor:
        return ops.prune(weight, dtype, mask, frozen)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.dtype, ctx.compute_dtype = inputs[0].dtype, inputs[1]

    @staticmethod
    def backward(ctx: Any, grad_pruned: Tensor) -> tuple[Tensor, None, None, None]:
        return grad_pruned.to(ctx.dtype), None, None, None


class PruneTokens(torch.autograd.Function):
    """x -> x~ in the compute dtype; the gradient reaches x unchanged, in x's dtype."""

    @staticmethod
    @_signed
    def forward(x: Tensor, dtype: torch.dtype) -> Tensor:
        return ops.prune_tokens(x, dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.dtype, ctx.compute_dtype = inputs[0].dtype, inputs[1]

    @staticmethod
    def backward(ctx: Any, grad_pruned: Tensor) -> tuple[Tensor, None]:
        return grad_pruned.to(ctx.dtype), None


class TransformedPruneWeight(PruneWeight):
    """PruneWeight with the rules that vmap and forward mode ask for; torch.compile refuses functions that have them."""

    generate_vmap_rule = True  # from the op's own rule

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *others: None) -> Tensor:
        return tangent.to(ctx.compute_dtype)


class TransformedPruneTokens(PruneTokens):
    """PruneTokens with the rules that vmap and forward mode ask for."""

    generate_vmap_rule = True

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *others: None) -> Tensor:
        return tangent.to(ctx.compute_dtype)


class PackedLinear(torch.autograd.Function):
    """y = x W~^T + b from the packed weight; x (M, K) and bias in the compute dtype, weight only receives its gradient.

    Of the packings only the one that the input gradient needs lives on to the backward pass: W~^T, or W~ where the mask
    is 2:4 along K only and the input gradient is therefore a masked dense product. A double backward raises.
    """

    @staticmethod
    @_signed
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, packed: Tensor, packed_t: Tensor, mask: str, engine: str
    ) -> Tensor:
        return ops.packed_linear(x, packed, bias, weight.shape[0], engine)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, packed, packed_t, mask, ctx.engine = inputs
        ctx.both_ways = mask not in ROW_WISE
        ctx.weight_dtype, ctx.weight_shape, ctx.dtype = weight.dtype, weight.shape, x.dtype
        ctx.save_for_backward(
            x if ctx.needs_input_grad[1] else None,
            (packed_t if ctx.both_ways else packed) if ctx.needs_input_grad[0] else None,
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, packed = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0] and ctx.both_ways:
            grad_x = ops.packed_linear(grad_output, packed, None, ctx.weight_shape[1], ctx.engine)
        elif ctx.needs_input_grad[0]:
            rows, columns = ctx.weight_shape
            grad_x = grad_output @ ops.unpack(packed, rows, columns, ctx.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = (grad_output.mT @ x).to(ctx.weight_dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = grad_output.sum(0)
        return grad_x, grad_weight, grad_bias, None, None, None, None


class PackedTokensLinear(torch.autograd.Function):
    """y = x~ W^T + b from the packed input; weight and bias in the compute dtype, x only receives its gradient."""

    @staticmethod
    @_signed
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, packed: Tensor, packed_t: Tensor, engine: str
    ) -> Tensor:
        return ops.packed_tokens_linear(packed, weight, bias, x.shape[0], engine)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, _, packed_t, ctx.engine = inputs
        ctx.x_dtype, ctx.in_features = x.dtype, x.shape[1]
        ctx.save_for_backward(
            weight if ctx.needs_input_grad[0] else None, packed_t if ctx.needs_input_grad[1] else None
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        weight, packed_t = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_output @ weight).to(ctx.x_dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = ops.packed_tokens_grad_weight(packed_t, grad_output, ctx.in_features, ctx.engine)
        if ctx.needs_input_grad[2]:
            grad_bias = grad_output.sum(0)
        return grad_x, grad_weight, grad_bias, None, None, None
