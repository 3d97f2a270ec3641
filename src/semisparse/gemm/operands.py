"""The tensors of one product, as one value, and the error for those that do not fit."""

from typing import NamedTuple

import torch
from torch import Tensor

from semisparse.errors import ShapeError, TensorError
from semisparse.formats.layout import ALIGNMENT
from semisparse.gemm.problem import Problem


class Operands(NamedTuple):
    """The tensors of D = A B (+ bias), on one device, contiguous and 16-byte aligned.

    A tuple, because it is built on every call and a dataclass takes three times as long to build.

    Attributes:
        packed: A in the engine's format, uint8; bytes behind those that the product needs are not read.
        b: B, of problem.b_shape and problem.dtype. A column-major matrix is passed as its transpose.
        out: D, of problem.d_shape and problem.out_dtype, written; it must not overlap b.
        bias: (rows,) of problem.dtype, exactly when problem.bias.
    """

    packed: Tensor
    b: Tensor
    out: Tensor
    bias: Tensor | None = None


def misfit(problem: Problem, packed_bytes: int, operands: Operands) -> TensorError | ShapeError:
    """The error for the first operand that does not fit a problem; called only when one does not.

    Args:
        problem: The product asked for.
        packed_bytes: Bytes that A takes.
        operands: The tensors given.
    """
    packed, b, out, bias = operands
    if (bias is not None) != problem.bias:
        return TensorError(f"bias={'None' if bias is None else tuple(bias.shape)}, but the problem is {problem}")
    expected: list[tuple[str, Tensor, tuple[int, ...], torch.dtype]] = [
        ("packed", packed, (packed_bytes,), torch.uint8),
        ("b", b, problem.b_shape, problem.dtype),
        ("out", out, problem.d_shape, problem.out_dtype),
    ]
    if bias is not None:
        expected.append(("bias", bias, (problem.rows,), problem.dtype))
    for name, tensor, shape, dtype in expected:
        if tuple(tensor.shape) != shape and (name != "packed" or tensor.numel() < packed_bytes):
            return ShapeError(f"{name} has shape {tuple(tensor.shape)}; {problem} needs {shape}")
        if tensor.dtype != dtype:
            return TensorError(f"{name} has dtype {tensor.dtype}; {problem} needs {dtype}")
        if tensor.device != out.device:
            return TensorError(f"{name} is on {tensor.device}, out on {out.device}; move both to one device")
        if not tensor.is_contiguous() or tensor.data_ptr() % ALIGNMENT:
            return TensorError(f"{name} must be contiguous and {ALIGNMENT}-byte aligned; pass a contiguous copy")
    raise AssertionError("every operand fits")
