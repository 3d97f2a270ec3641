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
