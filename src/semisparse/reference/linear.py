"""Forward and gradients of a linear layer with one pruned operand, written out as equations.

x: (M, K), weight: (N, K), bias: (N,) or None, grad_output: (M, N). Masks are bool, True = kept. Any float dtype; all
operands of one call in the same dtype. These functions are the definition that kernels and layers are tested against.
"""

import torch
from torch import Tensor

from semisparse.pattern import GROUP
from semisparse.reference import masks


def prune(matrix: Tensor, mask: Tensor) -> Tensor:
    """The kept entries, zero elsewhere. Selects rather than multiplies, so a pruned Inf or NaN becomes zero."""
    return torch.where(mask, matrix, 0)


def soft_threshold(matrix: Tensor, scale: Tensor | float) -> Tensor:
    """S-STE's continuous pruning (arXiv 2409.09099) of matrix (R x C, C a multiple of 4): row-wise 2:4, times scale.

    Of each 4 along the columns the 2 of largest magnitude are kept, each nearer to zero by the third magnitude:
    sign(a) * (|a| - t), so an entry that is about to be pruned is near zero already. Computed in fp32 (fp64 for an fp64
    matrix), returned in matrix's dtype. Raises ShapeError, TensorError.
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
    """The scale for which soft_threshold is nearest to matrix in the mean square: <W, S> / <S, S>.

    One fp32 number on matrix's device, from fp64 sums; 1 where nothing is left over. arXiv 2409.09099.
    """
    wide = matrix.detach().double()
    shrunk = soft_threshold(wide, 1.0)
    scale = (wide * shrunk).sum() / shrunk.square().sum()
    return torch.where(shrunk.any(), scale, 1.0).float()


def pad_tokens(x: Tensor) -> Tensor:
    """x (M, K) with zero rows added up to the next multiple of 4, so that it splits into 4x4 tiles."""
    missing = -x.shape[0] % GROUP
    return torch.cat([x, x.new_zeros(missing, x.shape[1])]) if missing else x


def prune_tokens(x: Tensor) -> Tensor:
    """x (M, K) pruned by exact transposable tiles over (tokens, features); a last partial tile counts zero rows."""
    padded = pad_tokens(x)
    return prune(padded, masks.transposable(padded))[: x.shape[0]]


def forward(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x W^T + b, shape (M, N); either operand may have been pruned before."""
    y = x @ weight.mT
    return y if bias is None else y + bias


def grad_input(grad_output: Tensor, weight: Tensor) -> Tensor:
    """dx = dy W, shape (M, K). Weight operand: W is the pruned weight. Activation operand: W is dense."""
    return grad_output @ weight


def grad_weight(grad_output: Tensor, x: Tensor) -> Tensor:
    """dW = dy^T x, shape (N, K), applied to the dense weight as it is (straight-through estimator).

    Weight operand: x is dense. Activation operand: x is the pruned input of the forward pass.
    """
    return grad_output.mT @ x


def grad_bias(grad_output: Tensor) -> Tensor:
    """db: the sum of dy over the tokens, shape (N,)."""
    return grad_output.sum(0)
