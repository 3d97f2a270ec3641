"""Which products are not tuned, because they are shorter than one tile of the library's kernels.

On one H100 (cuSPARSELt 0.8.0) an algorithm ended in an illegal instruction for an fp16 product with a reduction of 16,
after which the process cannot use the GPU: trying such algorithms is no way to find out. The library's default runs.
"""

import torch

from semisparse.formats.layout import FP8
from semisparse.gemm.problem import Problem
from semisparse.gemm.weight_gradient import WeightGradient

TILE = {torch.float16: 64, torch.bfloat16: 64, FP8: 128}
"""Of the reduction that a kernel takes at a time. A rest of rows or columns is met at all sizes."""


def not_tuned(asked: Problem | WeightGradient) -> str:
    """Why no algorithm but the library's default may run for a product; "" where it is tuned.

    Args:
        asked: The product. The way to a weight gradient is no algorithm of the library, and is measured.
    """
    if isinstance(asked, WeightGradient) or asked.reduction >= TILE[asked.dtype]:
        return ""
    tile = TILE[asked.dtype]
    return f"not tuned: a reduction of {asked.reduction} is shorter than the {tile} that a kernel takes at a time"
