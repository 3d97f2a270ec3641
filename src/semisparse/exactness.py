"""How exact a result must be: an error at most ERROR_RATIO times PyTorch's own in that dtype. No free tolerances."""

import math

import torch
from torch import Tensor

ERROR_RATIO = 2.0
"""Allowed maximum error, in units of plain PyTorch's maximum error in the same dtype (FlashAttention's test rule)."""


def largest(difference: Tensor) -> float:
    """The largest magnitude of a tensor; 0 without elements."""
    return float(difference.abs().max()) if difference.numel() else 0.0


def half_unit(value: float, dtype: torch.dtype) -> float:
    """Half the distance between neighbours of dtype at value (0 at 0), which correct rounding may cost."""
    _, exponent = math.frexp(value)
    return math.ldexp(torch.finfo(dtype).eps, exponent - 2) if value else 0.0


def own_error(same_dtype_result: Tensor, exact: Tensor) -> float:
    """PyTorch's largest error, at least half a unit of the largest exact value: few values can be exact by chance.

    Args:
        same_dtype_result: PyTorch's result, finite.
        exact: The same in fp64.
    """
    error = largest(same_dtype_result.double() - exact)
    return max(error, half_unit(largest(exact), same_dtype_result.dtype))
