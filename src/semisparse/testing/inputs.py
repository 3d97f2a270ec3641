"""Inputs whose products are exact, and shapes to test."""

from collections.abc import Sequence

import torch
from torch import Tensor

DTYPES: tuple[torch.dtype, ...] = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""Every dtype a layer takes."""

HALF_DTYPES: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16)
"""The dtypes that sparse tensor cores multiply."""

TOKEN_COUNTS: tuple[int, ...] = (0, 1, 3, 4, 7, 13, 64)
"""Token counts M: none, one, around a tile of 4 rows, odd ones, a full block."""

LINEAR_SHAPES: tuple[tuple[int, int, int], ...] = (
    (0, 16, 16),
    (1, 4, 4),
    (3, 8, 12),
    (4, 16, 16),
    (7, 12, 20),
    (13, 36, 100),
    (32, 64, 64),
    (65, 128, 32),
    (17, 20, 4),
)
"""(M, K, N): empty and tiny shapes, multiples of 4 but not of 16, and whole blocks plus one token."""


def small_integers(
    shape: Sequence[int],
    *,
    seed: int = 0,
    limit: int = 2,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Uniform whole numbers between -limit and limit.

    Sums of their products are exact in fp32 in any order of summation as long as K * limit^2 <= 2^24, so two correct
    products agree bit for bit (a result stored in bf16 or fp16 is rounded once more). Pruning by magnitude finds many
    ties among them.

    Args:
        shape: Sizes of the result.
        seed: The same seed gives the same numbers on every device.
        limit: The largest magnitude.
        dtype: Of the result.
        device: Of the result.

    Returns:
        A contiguous tensor.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-limit, limit + 1, tuple(shape), generator=generator).to(device=device, dtype=dtype)
