"""The gradient formulas of the fp8 linear layer, in the forms that autograd.py describes.

y = x8 W8~^T, dx = dy8 W8~, dW = dy8^T x8, each times the scales of its operands; db is the sum of dy before rounding.
With grad_output="mvue", dW = S(dy)8^T x8, with the sample of dy before rounding, unless the op finds it slower.
The operands of the functions are those of ops.fp8_linear, which functional_fp8.py makes.
"""

from typing import Any

import torch
from torch import Tensor

from semisparse import masks, ops
from semisparse.autograd import _first_order
from semisparse.ops.fp8_packed import fp8_forward, rescaled, sums_dtype
from semisparse.ops.register import LIBRARY


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """x8^T for dW, and for dx W8~^T, or W8~ where the mask is 2:4 along K only."""
    x, weight, bias, _, x8t, scale_x, w8, w8t, scale_w, ctx.mask, ctx.backend, ctx.dtype, *sampling = inputs
    grad_output, seed = sampling or (None, None)
    ctx.sampled = grad_output is not None
    ctx.x_dtype, ctx.weight_dtype, ctx.weight_shape = x.dtype, weight.dtype, weight.shape
    ctx.bias_dtype = None if bias is None else bias.dtype
    for_x, for_weight = ctx.needs_input_grad[:2]
    transposed = ctx.mask is None or masks.get(ctx.mask).both_ways
    kept = (w8t if transposed else w8, scale_w) if for_x else (None, None)
    ctx.save_for_backward(*((x8t, scale_x, seed) if for_weight else (None, None, None)), *kept)


@_first_order
def _backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
    """dy is read for the last time before both products. dW comes first, as in autograd.py."""
    (grad_output,), (x8t, scale_x, seed, w8, scale_w), needs = grad_outputs, ctx.saved_tensors, ctx.needs_input_grad
    grad_x = grad_weight = grad_bias = None
    rows, columns = ctx.weight_shape
    if needs[1] and ctx.sampled:
        bias_dtype = ctx.bias_dtype if needs[2] else None
        given = grad_output.detach(), x8t, scale_x, seed, needs[0], bias_dtype, ctx.backend, ctx.weight_dtype
        grad_weight, summed, dy8, scale_dy = ops.fp8_sampled_grad_weight(*given)
        grad_bias = summed if needs[2] else None
    elif needs[0] or needs[1]:
        dy8, dy8t, scale_dy = ops.quantise(grad_output.detach(), needs[0], needs[1])
    if needs[1] and not ctx.sampled:
        grad_weight = ops.fp8_dense_product(dy8t, x8t, ctx.weight_dtype, scale_dy, scale_x)
        del dy8t
    if needs[0] and ctx.mask is not None and masks.get(ctx.mask).both_ways:
        sums = ops.fp8_product(dy8, w8, columns, ctx.backend, sums_dtype(ctx.dtype))
        grad_x = rescaled(sums, scale_dy, scale_w, None, grad_output.shape[0], ctx.x_dtype)
    elif needs[0]:
        turned = w8 if ctx.mask is None else _turned(ops.unpack_fp8(w8, rows, columns))
        grad_x = ops.fp8_dense_product(dy8, turned, ctx.x_dtype, scale_dy, scale_w)[: grad_output.shape[0]]
    if needs[2] and grad_bias is None:
        grad_bias = grad_output.sum(0, dtype=ctx.bias_dtype)
    return grad_x, grad_weight, grad_bias, *(None,) * 11


def _turned(matrix: Tensor) -> Tensor:
    """The transpose of an e4m3 matrix, contiguous; as bytes, because not every version of torch copies the dtype."""
    return matrix.view(torch.uint8).mT.contiguous().view(matrix.dtype)


def _forward(inputs: tuple[Any, ...]) -> Tensor:
    x, weight, bias, x8, _, scale_x, w8, _, scale_w, mask, backend, dtype, *_ = inputs
    return fp8_forward(x.shape[0], weight.shape[0], bias, x8, scale_x, w8, scale_w, mask, backend, dtype)


class Fp8Linear(torch.autograd.Function):
    """The linear layer in fp8; the operands of ops.fp8_linear. A double backward raises."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        output = _forward(inputs)
        _save(ctx, inputs, output)
        return output

    backward = staticmethod(_backward)


class TransformedFp8Linear(torch.autograd.Function):
    """Fp8Linear inside torch.func.grad."""

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        return _forward(inputs)

    setup_context = staticmethod(_save)
    backward = staticmethod(_backward)


torch.library.register_autograd("semisparse::fp8_linear", _backward, setup_context=_save, lib=LIBRARY)
