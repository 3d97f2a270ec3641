"""Linear functions with one operand pruned to 2:4, and their gradients. The only file with gradient formulas.

Both functions prune in the forward pass and let the gradient pass straight through the pruning (straight-through
estimator): with W~ the pruned weight and x~ the pruned input,

    weight operand        y = x W~^T + b    dx = dy W~    dW = dy^T x
    activation operand    y = x~ W^T + b    dx = dy W     dW = dy^T x~

Under autocast the operand is pruned from its stored dtype (an fp32 master weight, say) and rounded to the autocast
dtype in the same pass; gradients come back in the parameter's dtype.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from semisparse import ops
from semisparse.errors import ShapeError, TensorError
from semisparse.pattern import GROUP
from semisparse.reference.masks import FLOAT_DTYPES


class _PruneWeight(torch.autograd.Function):
    """W -> W~ in the compute dtype; the gradient reaches W unchanged, in W's dtype."""

    @staticmethod
    def forward(weight: Tensor, dtype: torch.dtype, mask: str) -> Tensor:
        return ops.prune(weight, dtype, mask)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, grad_pruned: Tensor) -> tuple[Tensor, None, None]:
        return grad_pruned.to(ctx.dtype), None, None


class _PruneTokens(torch.autograd.Function):
    """x -> x~ in the compute dtype; the gradient reaches x unchanged, in x's dtype."""

    @staticmethod
    def forward(x: Tensor, dtype: torch.dtype) -> Tensor:
        return ops.prune_tokens(x, dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, grad_pruned: Tensor) -> tuple[Tensor, None]:
        return grad_pruned.to(ctx.dtype), None


def semi_sparse_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, mask: str = "transposable") -> Tensor:
    """y = x W~^T + b with W~ the weight pruned to 2:4 by magnitude at this call. Returns (..., N).

    x: (..., K), weight: (N, K) with N and K multiples of 4, bias: (N,) or None; any strides, fp64, fp32, fp16 or bf16,
    all of one dtype unless autocast is on. mask: "transposable" or "row" (see SparseConfig). The mask is exact; the
    products are PyTorch's own in the compute dtype. Raises ShapeError, TensorError.
    """
    check_operands(x, weight, bias)
    pruned: Tensor = _PruneWeight.apply(weight, compute_dtype(x, weight), mask)
    return F.linear(x, pruned, bias)


def semi_sparse_activation_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x~ W^T + b with x~ the input pruned by 4x4 tiles over (tokens, features). Returns (..., N).

    Leading dimensions of x are flattened to tokens in order; a token count that is no multiple of 4 counts zero rows.
    Shapes, dtypes, exactness and errors as semi_sparse_linear. The gradient of x passes straight through the pruning.
    """
    check_operands(x, weight, bias)
    pruned: Tensor = _PruneTokens.apply(x.reshape(x.shape[:-1].numel(), x.shape[-1]), compute_dtype(x, weight))
    return F.linear(pruned.view(x.shape), weight, bias)


def compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype of the products: autocast's where autocast applies (never to fp64), else the weight's."""
    device = x.device.type
    if x.dtype == torch.float64 or weight.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return weight.dtype
    return torch.get_autocast_dtype(device)


def check_operands(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise ShapeError or TensorError, naming the operand, unless the three operands fit together."""
    if weight.dim() != 2 or weight.shape[0] % GROUP or weight.shape[1] % GROUP:
        raise ShapeError(
            f"weight has shape {tuple(weight.shape)}; it must be (N, K), both multiples of {GROUP}: "
            "keep this layer dense or pad it"
        )
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ShapeError(f"x has shape {tuple(x.shape)}; its last size must be in_features={weight.shape[1]}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ShapeError(f"bias has shape {tuple(bias.shape)}; it must be ({weight.shape[0]},)")
    autocast = torch.is_autocast_enabled(x.device.type)
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.device != weight.device:
            raise TensorError(f"{name} is on {tensor.device}, weight on {weight.device}; move both to one device")
        if tensor.dtype not in FLOAT_DTYPES:
            raise TensorError(f"{name} has dtype {tensor.dtype}; use float64, float32, float16 or bfloat16")
        if tensor.dtype != weight.dtype and not autocast:
            raise TensorError(
                f"{name} has dtype {tensor.dtype}, weight {weight.dtype}; convert one of them or use torch.autocast"
            )
