"""What is not tried, because trying may end the CUDA context: algorithms for one kind of products, and short products.

After an illegal instruction the process cannot use the GPU, so that trying is no way to find out. Both rules are of one
H100 with cuSPARSELt 0.8.0, and hold everywhere: what they cost is two algorithms of 36.
"""

from collections.abc import Iterable

import torch

from semisparse.formats.layout import FP8
from semisparse.gemm.problem import Order, Problem
from semisparse.gemm.weight_gradient import WeightGradient

TILE = {torch.float16: 64, torch.bfloat16: 64, FP8: 128}
"""Of the reduction that a kernel takes at a time. A rest of rows or columns is met at all sizes. An fp16 product with a
reduction of 16 ended in an illegal instruction; shorter ones run the library's default."""

NOT_TRIED: dict[tuple[torch.dtype, Order, Order], frozenset[int]] = {
    (torch.float16, "row", "column"): frozenset({34, 35}),
}
"""Algorithms by dtype, b_order and d_order. Both ended in an illegal instruction at each such shape that the trust
suite tried, and no other algorithm did (docs/reliability.md). A weight's gradient from a pruned activation is one."""


def not_tuned(asked: Problem | WeightGradient) -> str:
    """Why no algorithm but the library's default may run for a product; "" where it is tuned.

    Args:
        asked: The product. The way to a weight gradient is no algorithm of the library, and is measured.
    """
    if isinstance(asked, WeightGradient) or asked.reduction >= TILE[asked.dtype]:
        return ""
    tile = TILE[asked.dtype]
    return f"not tuned: a reduction of {asked.reduction} is shorter than the {tile} that a kernel takes at a time"


def may_run(offered: Iterable[int], problem: Problem) -> list[int]:
    """Of the algorithms that the library offers for a product, those that may be tried, in their order.

    Args:
        offered: Their ids.
        problem: The product.
    """
    lost = NOT_TRIED.get((problem.dtype, problem.b_order, problem.d_order), frozenset())
    return [algorithm for algorithm in offered if algorithm not in lost]
