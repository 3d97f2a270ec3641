"""The masked-dense counterpart of a sparse product: the same D = A B (+ bias) by PyTorch, same storage of D."""

import torch
from torch import Tensor

from semisparse.errors import ShapeError
from semisparse.gemm.problem import Problem


def product(problem: Problem, a: Tensor, b: Tensor, out: Tensor, bias: Tensor | None = None) -> None:
    """out = A B (+ bias) with PyTorch's own matmul, in place of the sparse engine; any sizes, any device.

    a: the pruned operand as a full matrix (rows x columns, zeros where pruned), any strides. b, out: tensors of
    problem.b_shape and problem.d_shape, as the engine takes them (a column-major matrix is passed as its transpose).
    bias: (rows,) or None. Not recorded by autograd. Rounding is that of torch.addmm in problem.dtype.
    Raises ShapeError where a shape differs.
    """
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
