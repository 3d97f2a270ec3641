"""Products of many tokens in chunks: D and B are cut along the tokens, and A is used whole for each piece.

Why: on some cards the library's speed collapses at large token counts. Published timings of vLLM on an RTX 4090
(SlideSparse) show 2:4 fp8 at 0.51x of dense with 32,768 tokens, and at 1.44x to 1.55x up to 16,384. Whether chunks
are faster is measured for each problem (autotune/in_chunks.py).

Only products whose tokens are the columns of B and D, both in column order, are cut: `forward`, `grad_input` and their
fp8 counterparts. There the tensors that hold B and D have one row per token, so that pieces are blocks of rows and
nothing is copied. Tokens that are packed (activation_forward), or summed over (dW), stay whole.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

from semisparse.gemm.operands import Operands, misfit
from semisparse.gemm.problem import Problem

CHUNK = 16384
"""Tokens per piece; a bucket of the autotuner ends there, so all problems of a bucket are cut or none."""


def can_be_cut(problem: Problem, chunk: int = CHUNK) -> bool:
    """Whether a problem has more tokens than a chunk, stored so that pieces are made without a copy."""
    in_rows = problem.token_axis == "columns" and problem.b_order == problem.d_order == "column"
    return in_rows and problem.tokens > chunk


@lru_cache(4096)
def sized(problem: Problem, tokens: int) -> Problem:
    """The problem of one piece: the same product with this many tokens. Cached, so that look-ups compare no fields."""
    return replace(problem, columns=tokens)


def pieces(problem: Problem, operands: Operands, chunk: int | None) -> Iterator[tuple[Problem, Operands]]:
    """The products that together write D, in the order of the tokens.

    Args:
        problem: The whole product.
        operands: Its tensors.
        chunk: Tokens per piece, a multiple of 16; the last piece has the rest. None, or a problem that cannot be cut:
            the whole product is the only piece.

    Yields:
        Problem and operands of each piece, views of the whole operands.

    Raises:
        ShapeError: The problem is cut, and b or out has another shape than it says.
    """
    if chunk is None or not can_be_cut(problem, chunk):
        yield problem, operands
        return
    packed, b, out, bias = operands
    if b.shape != problem.b_shape or out.shape != problem.d_shape:
        raise misfit(problem, 0, operands)
    for begin in range(0, problem.columns, chunk):
        end = min(begin + chunk, problem.columns)
        yield sized(problem, end - begin), Operands(packed, b[begin:end], out[begin:end], bias)
