"""The gradient formulas of the package, and the only ones (written out in functional.py).

Each formula has the forms that its callers need, from the same two functions (what to save, and the backward):
    an autograd.Function that gets ctx first, for eager and compiled steps, because it costs the host least;
    one with setup_context, which torch.func transforms ask for and torch.compile does not take with rules for vmap;
    a formula registered for an op, which is what an exported graph or an op that is called by itself has.

The operands are checked and converted by functional.py.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from semisparse import masks, ops
from semisparse.operands import as_tokens
from semisparse.ops.register import LIBRARY


def _save_prune(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.dtype, ctx.compute_dtype = inputs[0].dtype, inputs[1]


def _prune_backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    """Straight through, in the dtype of what was pruned."""
    return grads[0].to(ctx.dtype), None, None, None, None


def _prune_tokens_backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
    return grads[0].to(ctx.dtype), None


class TransformedPruneWeight(torch.autograd.Function):
    """W -> W~ in the compute dtype inside torch.func transforms; the gradient reaches W unchanged, in W's dtype."""

    generate_vmap_rule = True  # from the op's own rule

    @staticmethod
    def forward(weight: Tensor, dtype: torch.dtype, mask: str, codes: Tensor | None, scale: Tensor | None) -> Tensor:
        return ops.prune(weight, dtype, mask, codes, scale)

    setup_context = staticmethod(_save_prune)
    backward = staticmethod(_prune_backward)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *others: None) -> Tensor:
        return tangent.to(ctx.compute_dtype)


class TransformedPruneTokens(torch.autograd.Function):
    """x -> x~ in the compute dtype inside torch.func transforms; the gradient reaches x unchanged, in x's dtype."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, dtype: torch.dtype) -> Tensor:
        return ops.prune_tokens(x, dtype)

    setup_context = staticmethod(_save_prune)
    backward = staticmethod(_prune_tokens_backward)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *others: None) -> Tensor:
        return tangent.to(ctx.compute_dtype)


def _first_order(backward: Callable[..., tuple[Tensor | None, ...]]) -> Callable[..., tuple[Tensor | None, ...]]:
    """once_differentiable, without its cost where no graph of the backward is asked for."""
    once = once_differentiable(backward)

    @wraps(backward)
    def call(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        return (once if torch.is_grad_enabled() else backward)(ctx, *grad_outputs)

    return call


def apply(function: type[torch.autograd.Function], x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Any:
    """function.apply outside torch.func transforms; where no compiler looks, at a lower cost.

    As function.apply does, it unwraps tensors that a finished torch.func transform has left behind; but only the three
    tensors that can be such, where function.apply inspects every argument in Python.
    """
    if torch.compiler.is_compiling():
        return function.apply(x, weight, bias, *rest)
    unwrap = torch._C._functorch.unwrap_if_dead
    added = None if bias is None else unwrap(bias)
    return super(torch.autograd.Function, function).apply(unwrap(x), unwrap(weight), added, *rest)  # type: ignore[misc]


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Of the packings only what dx needs lives on: W~^T, or W~ where the mask is 2:4 along K only."""
    x, weight, _, packed, packed_t, mask, backend, *sampling = inputs
    _keep(ctx, x, weight, packed_t if masks.get(mask).both_ways else packed, mask, backend, *sampling)


def _keep(
    ctx: Any,
    x: Tensor,
    weight: Tensor,
    kept: Tensor,
    mask: str,
    backend: str,
    grad_output: str | None = None,
    seed: Tensor | None = None,
) -> None:
    needs = ctx.needs_input_grad
    ctx.mask, ctx.backend, ctx.weight_dtype, ctx.weight_shape = mask, backend, weight.dtype, weight.shape
    ctx.sampled = grad_output is not None
    ctx.save_for_backward(x if needs[1] else None, kept if needs[0] else None, seed if needs[1] else None)


@_first_order
def _linear_backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
    """dx = dy W~, as a masked dense product where W~^T has no packed form; dW = dy^T x, or with dy sampled; db.

    dW comes first, so that the memory of the sample is free again before dx takes some.
    """
    (grad_output,), (x, kept, seed, *held), needs = grad_outputs, ctx.saved_tensors, ctx.needs_input_grad
    grad_x = grad_weight = grad_bias = None
    if needs[1] or needs[2]:
        tokens = as_tokens(grad_output)
        if needs[1] and ctx.sampled:
            grad_weight, summed = ops.sampled_grad_weight(tokens, as_tokens(x), seed, needs[2], ctx.backend)
            grad_bias = summed if needs[2] else None
        elif needs[1]:
            grad_weight = tokens.mT @ as_tokens(x)
        if grad_weight is not None and grad_weight.dtype != ctx.weight_dtype:
            grad_weight = grad_weight.to(ctx.weight_dtype)
        if needs[2] and grad_bias is None:
            grad_bias = tokens.sum(0)
    if needs[0]:
        rows, columns = ctx.weight_shape
        # What is held is the weight itself where its transpose is packed for the backward alone.
        packed = ops.pack_transpose(kept.detach(), ctx.dtype, ctx.mask, *held) if held else kept
        if masks.get(ctx.mask).both_ways:
            grad_x = ops.packed_matmul(grad_output, packed, None, columns, ctx.backend)
        else:
            grad_x = grad_output @ ops.unpack(packed, rows, columns, grad_output.dtype)
    return grad_x, grad_weight, grad_bias, None, None, None, None, None, None


class PackLinear(torch.autograd.Function):
    """y = x W~^T + b from the weight; the operands of ops.pack_linear, then grad_output and seed.

    A double backward raises.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        *operands, grad_output, seed = inputs
        output, kept = ops.pack_linear(*operands)
        _keep(ctx, inputs[0], inputs[1], kept, inputs[3], inputs[6], grad_output, seed)
        return output

    backward = staticmethod(_linear_backward)


class PackedLinear(torch.autograd.Function):
    """y = x W~^T + b from the packed weight; the operands of ops.packed_linear. A double backward raises."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, weight, bias, packed, _, _, backend, *_ = inputs
        output = ops.packed_matmul(x, packed, bias, weight.shape[0], backend)
        _save_linear(ctx, inputs, output)
        return output

    backward = staticmethod(_linear_backward)


class ForwardPackedLinear(torch.autograd.Function):
    """PackedLinear with W~ alone: the backward packs W~^T from the weight, which is saved with what chose its mask."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, weight, bias, packed, codes, scale, ctx.mask, ctx.backend, grad_output, seed = inputs
        ctx.sampled = grad_output is not None
        ctx.weight_dtype, ctx.weight_shape, ctx.dtype = weight.dtype, weight.shape, x.dtype
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        kept = (weight, codes, scale) if needs_x else (None, None, None)
        ctx.save_for_backward(x if needs_weight else None, kept[0], seed if needs_weight else None, *kept[1:])
        output: Tensor = ops.packed_matmul(x, packed, bias, weight.shape[0], ctx.backend)
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        return *_linear_backward(ctx, *grad_outputs), None


class TransformedPackedLinear(torch.autograd.Function):
    """PackedLinear inside torch.func.grad."""

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        x, weight, bias, packed, _, _, backend, *_ = inputs
        return ops.packed_matmul(x, packed, bias, weight.shape[0], backend)

    setup_context = staticmethod(_save_linear)
    backward = staticmethod(_linear_backward)


def _save_tokens_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, _, packed_t, ctx.backend = inputs
    ctx.x_dtype, ctx.in_features = x.dtype, x.shape[1]
    ctx.save_for_backward(weight if ctx.needs_input_grad[0] else None, packed_t if ctx.needs_input_grad[1] else None)


@_first_order
def _tokens_linear_backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
    """dx = dy W, straight through the pruning; dW = dy^T x~; db = the sum of dy."""
    (grad_output,), (weight, packed_t) = grad_outputs, ctx.saved_tensors
    grad_x = grad_weight = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = (grad_output @ weight).to(ctx.x_dtype)
    if ctx.needs_input_grad[1]:
        grad_weight = ops.packed_tokens_grad_weight(packed_t, grad_output, ctx.in_features, ctx.backend)
    if ctx.needs_input_grad[2]:
        grad_bias = grad_output.sum(0)
    return grad_x, grad_weight, grad_bias, None, None, None


class PackedTokensLinear(torch.autograd.Function):
    """y = x~ W^T + b from the packed input; the operands of ops.packed_tokens_linear. A double backward raises."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, weight, bias, packed, _, backend = inputs
        output = ops.packed_tokens_matmul(packed, weight, bias, x.shape[0], backend)
        _save_tokens_linear(ctx, inputs, output)
        return output

    backward = staticmethod(_tokens_linear_backward)


class TransformedPackedTokensLinear(torch.autograd.Function):
    """PackedTokensLinear inside torch.func.grad."""

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        x, weight, bias, packed, _, backend = inputs
        return ops.packed_tokens_matmul(packed, weight, bias, x.shape[0], backend)

    setup_context = staticmethod(_save_tokens_linear)
    backward = staticmethod(_tokens_linear_backward)


def _save_sampled_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    (x, weight, _, seed), needs = inputs, ctx.needs_input_grad
    ctx.save_for_backward(x if needs[1] else None, weight if needs[0] else None, seed if needs[1] else None)


@_first_order
def _sampled_linear_backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
    """dx = dy W~; dW = S(dy)^T x; db = the sum of dy."""
    (grad_output,), (x, weight, seed), needs = grad_outputs, ctx.saved_tensors, ctx.needs_input_grad
    tokens = as_tokens(grad_output)
    grad_x = grad_output @ weight if needs[0] else None
    grad_weight = ops.sample(tokens, seed).mT @ as_tokens(x) if needs[1] else None
    return grad_x, grad_weight, tokens.sum(0) if needs[2] else None, None


class TransformedSampledLinear(torch.autograd.Function):
    """The masked dense y = x W~^T + b with dW = S(dy)^T x, inside torch.func transforms."""

    generate_vmap_rule = True  # the backward's from the rule of ops.sample

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, seed: Tensor | None) -> Tensor:
        return torch.nn.functional.linear(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _save_sampled_linear(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:2])

    backward = staticmethod(_sampled_linear_backward)

    @staticmethod
    def jvp(ctx: Any, x_tangent: Any, weight_tangent: Any, bias_tangent: Any, *others: None) -> Tensor:
        x, weight = ctx.saved_tensors
        parts = [
            None if x_tangent is None else x_tangent @ weight.mT,
            None if weight_tangent is None else x @ weight_tangent.mT,
            bias_tangent,
        ]
        given = [part for part in parts if part is not None]
        total: Tensor = sum(given[1:], start=given[0])
        return total


for _name, _backward, _save in (
    ("prune", _prune_backward, _save_prune),
    ("prune_tokens", _prune_tokens_backward, _save_prune),
    ("packed_linear", _linear_backward, _save_linear),
    ("sampled_linear", _sampled_linear_backward, _save_sampled_linear),
    ("packed_tokens_linear", _tokens_linear_backward, _save_tokens_linear),
):
    torch.library.register_autograd(f"semisparse::{_name}", _backward, setup_context=_save, lib=LIBRARY)
