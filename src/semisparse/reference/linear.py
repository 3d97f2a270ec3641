"""Forward and gradients of a linear layer with one pruned operand, written out as equations; the last ones in fp8.

x: (M, K), weight: (N, K), bias: (N,) or None, grad_output: (M, N). Masks are bool, True = kept. Any float dtype; all
operands of one call have the same dtype. Kernels and layers are tested against these functions.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from semisparse.pattern import GROUP
from semisparse.reference import fp8, masks


def prune(matrix: Tensor, mask: Tensor) -> Tensor:
    """The kept entries, zero elsewhere. It selects rather than multiplies, so a pruned Inf or NaN becomes zero."""
    return torch.where(mask, matrix, 0)


def soft_threshold(matrix: Tensor, scale: Tensor | float) -> Tensor:
    """Continuous row-wise 2:4 pruning, times scale: S-STE (arXiv 2409.09099).

    Of each 4 along the columns the 2 of largest magnitude are kept, each reduced by the third magnitude t:
    sign(a) * (|a| - t). An entry that is about to be pruned is therefore near zero already. Computed in fp32 (in fp64
    for an fp64 matrix) and rounded once.

    Args:
        matrix: R x C, C a multiple of 4.
        scale: One number; as a tensor it stays on its device.

    Returns:
        R x C in matrix's dtype.

    Raises:
        ShapeError, TensorError: matrix has no such groups, or is not of a float dtype.
    """
    mask = masks.row(matrix)
    wide = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    size = wide.abs()
    others = torch.where(mask, 0, masks.magnitude(matrix)).to(wide.dtype)
    if matrix.dtype == torch.float64:
        others = torch.where(mask, 0, size)
    groups = others.view(matrix.shape[0], matrix.shape[1] // GROUP, GROUP)
    threshold = groups.amax(-1, keepdim=True).expand_as(groups).reshape(matrix.shape)
    rest = size - threshold
    rest = torch.where(rest < 0, 0, rest) * scale
    return prune(torch.where(wide < 0, 0 - rest, rest), mask).to(matrix.dtype)  # not -rest: what shrinks to 0 is +0


def soft_scale(matrix: Tensor) -> Tensor:
    """The scale that minimises the mean square of matrix - soft_threshold(matrix, scale): <W, S> / <S, S>.

    From arXiv 2409.09099.

    Args:
        matrix: R x C, C a multiple of 4.

    Returns:
        One fp32 number on matrix's device, from fp64 sums; 1 if soft_threshold leaves only zeros.
    """
    wide = matrix.detach().double()
    shrunk = soft_threshold(wide, 1.0)
    scale = (wide * shrunk).sum() / shrunk.square().sum()
    return torch.where(shrunk.any(), scale, 1.0).float()


def pad_tokens(x: Tensor) -> Tensor:
    """x (M, K) with zero rows appended up to the next multiple of 4, so that it splits into 4x4 tiles."""
    missing = -x.shape[0] % GROUP
    return torch.cat([x, x.new_zeros(missing, x.shape[1])]) if missing else x


def prune_tokens(x: Tensor) -> Tensor:
    """x (M, K) pruned by exact transposable tiles over (tokens, features); zero rows complete a last partial tile."""
    padded = pad_tokens(x)
    return prune(padded, masks.transposable(padded))[: x.shape[0]]


def forward(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x W^T + b, shape (M, N). Either operand may be pruned already."""
    y = x @ weight.mT
    return y if bias is None else y + bias


def grad_input(grad_output: Tensor, weight: Tensor) -> Tensor:
    """dx = dy W, shape (M, K). W is the pruned weight, or the dense one if the activation is pruned."""
    return grad_output @ weight


def grad_weight(grad_output: Tensor, x: Tensor) -> Tensor:
    """dW = dy^T x, shape (N, K), the gradient of the dense weight (straight-through estimator).

    x is the input of the forward product: dense, or pruned if the activation is pruned.
    """
    return grad_output.mT @ x


def grad_bias(grad_output: Tensor) -> Tensor:
    """db: the sum of dy over the tokens, shape (N,)."""
    return grad_output.sum(0)


class Quantised(NamedTuple):
    """A matrix in fp8: matrix is about values * scale.

    Attributes:
        values: What the e4m3 codes stand for, exact in fp64.
        scale: One fp32 number, a power of two; NaN if the matrix is not finite.
    """

    values: Tensor
    scale: Tensor


def quantised(matrix: Tensor, mask: Tensor | None = None) -> Quantised:
    """matrix in fp8, scaled by its largest magnitude; with a mask, pruned afterwards."""
    multiplier = fp8.multiplier_for(fp8.largest_magnitude(matrix))
    codes = fp8.quantise(matrix if mask is None else prune(matrix, mask), multiplier).view(torch.uint8)
    return Quantised(fp8.decode(codes).double(), 1 / multiplier)


def fp8_product(a: Quantised, b: Quantised, bias: Tensor | None, sums: torch.dtype, result: torch.dtype) -> Tensor:
    """a b^T with its scale, plus bias.

    Args:
        a: R x C.
        b: S x C.
        bias: (S,) or None.
        sums: What the product is rounded to before it is scaled.
        result: What it is rounded to after scale and bias, which are computed in fp32.
    """
    y = (a.values @ b.values.mT).to(sums).float() * (a.scale * b.scale)
    return (y if bias is None else y + bias.float()).to(result)


def fp8_sums(dtype: torch.dtype) -> torch.dtype:
    """What products are rounded to before they are scaled in a second pass, for calls in dtype; never fp16.

    A dense product without bias is scaled where it is computed, in fp32, and rounded once.
    """
    return torch.bfloat16 if dtype is torch.bfloat16 else torch.float32


def fp8_forward(x: Tensor, weight: Tensor, mask: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """y = x8 W8~^T * (sx * sw) + b, shape (M, N), in dtype. sw is that of all of W; with mask None W8~ is W8."""
    once = mask is None and bias is None
    return fp8_product(quantised(x), quantised(weight, mask), bias, torch.float32 if once else fp8_sums(dtype), dtype)


def fp8_grad_input(
    grad_output: Tensor, weight: Tensor, mask: Tensor | None, result: torch.dtype, *, sparse: bool
) -> Tensor:
    """dx = dy8 W8~ * (sdy * sw), shape (M, K), in the dtype result. The call's dtype is dy's.

    Args:
        grad_output: dy.
        weight: W.
        mask: What is kept of it; None for all.
        result: dtype of x.
        sparse: Whether W~^T is packed, too, so that the product is scaled in a second pass.
    """
    w, sums = quantised(weight, mask), fp8_sums(grad_output.dtype) if sparse else torch.float32
    return fp8_product(quantised(grad_output), Quantised(w.values.mT, w.scale), None, sums, result)


def fp8_grad_weight(grad_output: Tensor, x: Tensor, result: torch.dtype) -> Tensor:
    """dW = dy8^T x8 * (sdy * sx), shape (N, K), straight through to the dense weight, in its dtype result."""
    dy, tokens = quantised(grad_output), quantised(x)
    turned = Quantised(dy.values.mT, dy.scale), Quantised(tokens.values.mT, tokens.scale)
    return fp8_product(*turned, None, torch.float32, result)
