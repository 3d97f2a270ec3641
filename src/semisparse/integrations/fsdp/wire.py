"""What travels instead of a pruned weight: its kept values, and one bit per entry that says where they belong."""

import torch
from torch import Tensor

from semisparse.ops.masks import has_triton
from semisparse.pattern import GROUP, KEPT
from semisparse.reference.masks import from_codes


def keep(matrix: Tensor, codes: Tensor) -> Tensor:
    """The values (R x C/2) that tile codes (int16, R/4 x C/4) keep of a matrix (R x C, contiguous), row by row.

    Each group of 4 keeps exactly two, as with masks "transposable" and "row".
    """
    rows, columns = matrix.shape
    if _by_kernel(matrix):
        from semisparse.kernels import kept_values

        values = matrix.new_empty(rows, columns // GROUP * KEPT)
        kept_values.keep_values(matrix, codes, values)
        return values
    return matrix.masked_select(from_codes(codes)).view(rows, columns // GROUP * KEPT)


def spread(values: Tensor, codes: Tensor, matrix: Tensor) -> None:
    """Write the pruned matrix (R x C, contiguous) that keep's result stands for; dropped entries become zero."""
    if _by_kernel(matrix):
        from semisparse.kernels import kept_values

        kept_values.spread_values(values, codes, matrix)
    else:
        matrix.zero_().masked_scatter_(from_codes(codes), values)


def to_e4m3(values: Tensor, multiplier: Tensor) -> Tensor:
    """values times a multiplier, rounded to e4m3, as bytes (uint8).

    multiplier follows from the largest magnitude, so no product is beyond e4m3's range, and NaN makes all of them NaN:
    where all versions of torch round alike.
    """
    return (values.float() * multiplier).to(torch.float8_e4m3fn).view(torch.uint8)


def from_e4m3(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers that bytes of to_e4m3 stand for, times scale, a power of two: exact in fp32 and bf16."""
    return codes.view(torch.float8_e4m3fn).to(dtype) * scale.to(dtype)


def _by_kernel(matrix: Tensor) -> bool:
    return matrix.is_cuda and has_triton()
