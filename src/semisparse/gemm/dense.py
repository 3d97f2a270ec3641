"""The masked-dense counterpart of a sparse product: the same D = A B (+ bias) by PyTorch, same storage of D."""

import torch
from torch import Tensor

from semisparse.errors import ShapeError
from semisparse.gemm.operands import Operands
from semisparse.gemm.problem import Problem


def product(problem: Problem, a: Tensor, operands: Operands) -> None:
    """D = A B (+ bias) with PyTorch's own matmul, in place of the sparse engine. Not recorded by autograd.

    Args:
        problem: The product; any sizes, any device. Rounding is that of torch.addmm in problem.dtype.
        a: The pruned operand as a full matrix (rows x reduction, zeros where pruned), any strides.
        operands: b, out and bias as the engine takes them; packed is not read.

    Raises:
        ShapeError: A shape differs from the problem's.
    """
    _, b, out, bias = operands
    wanted: list[tuple[str, Tensor | None, tuple[int, ...]]] = [
        ("a", a, (problem.rows, problem.reduction)),
        ("b", b, problem.b_shape),
        ("out", out, problem.d_shape),
        ("bias", bias, (problem.rows,)),
    ]
    for name, tensor, shape in wanted:
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ShapeError(f"{name} has shape {tuple(tensor.shape)}; {problem} needs {shape}")
    with torch.no_grad():
        if problem.d_order == "row":
            left, right, added = a, b if problem.b_order == "row" else b.mT, None if bias is None else bias[:, None]
        else:
            # D^T = B^T A^T, so that the bias lies along the last axis and PyTorch can add it in its own epilogue.
            left, right, added = b.mT if problem.b_order == "row" else b, a.mT, bias
        if added is None:
            torch.mm(left, right, out=out)
        else:
            torch.addmm(added, left, right, out=out)
