"""The masked-dense counterpart of a sparse product: the same D = A B (+ bias) by PyTorch, same storage of D."""

import torch
from torch import Tensor

from semisparse.errors import ShapeError
from semisparse.formats.layout import FP8
from semisparse.gemm.operands import Operands
from semisparse.gemm.problem import Problem


def product(problem: Problem, a: Tensor, operands: Operands) -> None:
    """D = A B (+ bias) with PyTorch's own matmul, in place of the sparse engine. Not recorded by autograd.

    Args:
        problem: The product; any sizes, any device. Rounding is that of torch.addmm in problem.dtype. float8_e4m3fn is
            multiplied in fp32 and rounded once; on CUDA by torch._scaled_mm, which needs multiples of 16.
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
        if problem.dtype is FP8:
            turned = b if problem.b_order == "column" else b.mT
            _fp8_product(*((a, turned) if problem.d_order == "row" else (turned, a)), out)
            return
        if problem.d_order == "row":
            left, right, added = a, b if problem.b_order == "row" else b.mT, None if bias is None else bias[:, None]
        else:
            # D^T = B^T A^T, so that the bias lies along the last axis and PyTorch can add it in its own epilogue.
            left, right, added = b.mT if problem.b_order == "row" else b, a.mT, bias
        if added is None:
            torch.mm(left, right, out=out)
        else:
            torch.addmm(added, left, right, out=out)


def _fp8_product(left: Tensor, right: Tensor, out: Tensor) -> None:
    """left right^T of float8_e4m3fn matrices, without scale: what the codes stand for is multiplied.

    On CUDA by torch._scaled_mm without fast accumulation; elsewhere by an fp32 matmul. Rounded to out's dtype once.

    Args:
        left: R x C, any strides; on CUDA, C must be a multiple of 16.
        right: S x C, likewise; on CUDA, S must be a multiple of 16, too.
        out: R x S, contiguous, bf16 or fp32, written.
    """
    if left.device.type != "cuda":
        out.copy_(left.float() @ right.float().mT)
        return
    # Made anew in each call: a tensor kept from a CUDA graph's capture would live in the memory of that graph.
    one = left.new_ones((), dtype=torch.float32)
    # use_fast_accum=True would leave partial sums in the tensor cores, with fewer bits than fp32 has, over the whole
    # reduction. Tuning would then choose between products of different accuracy.
    torch._scaled_mm(
        left.contiguous(), right.contiguous().mT, one, one, out_dtype=out.dtype, use_fast_accum=False, out=out
    )
