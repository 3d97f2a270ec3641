"""The products of training on a real GPU: operands, and the result that they must have."""

from functools import partial

import torch
from torch import Tensor

from semisparse.gemm import problem as problems
from semisparse.gemm.autotune.candidates import integers, keep_two_of_four
from semisparse.gemm.problem import Problem

PRODUCTS = {
    "forward": lambda tokens, n, k, dtype: problems.forward(tokens, n, k, dtype),
    "forward with bias": lambda tokens, n, k, dtype: problems.forward(tokens, n, k, dtype, bias=True),
    "grad_input": problems.grad_input,
    "activation_forward": problems.activation_forward,
    "activation_weight": problems.activation_weight,
    "sampled_weight": problems.sampled_weight,
}
FP8_PRODUCTS = {
    f"{kind.__name__} into {str(dtype).removeprefix('torch.')}": partial(kind, out_dtype=dtype)
    for kind in (problems.fp8_forward, problems.fp8_grad_input, problems.fp8_sampled_weight)
    for dtype in (torch.bfloat16, torch.float32)
}
FORWARD = problems.forward(1000, 1024, 512, torch.bfloat16, bias=True)


def whole(problem: Problem, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """a (full matrix), b, out (NaN) and bias on the GPU: small integers."""
    generator = torch.Generator("cuda").manual_seed(seed)
    device = torch.device("cuda")
    a = integers((problem.rows, problem.reduction), problem.dtype, device, generator)
    keep_two_of_four(a, generator, 2**22)
    b = integers(problem.b_shape, problem.dtype, device, generator)
    bias = integers((problem.rows,), problem.dtype, device, generator) if problem.bias else None
    return a, b, torch.full(problem.d_shape, float("nan"), dtype=problem.out_dtype, device=device), bias


def real(problem: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The same with normal numbers."""
    a, b, out, bias = whole(problem)
    a = torch.where(a != 0, torch.randn_like(a), 0)
    return a, torch.randn_like(b), out, None if bias is None else torch.randn_like(bias)


def product(problem: Problem, a: Tensor, b: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The product computed in dtype, stored as D is; exact for integers in fp32."""
    result = a.to(dtype) @ (b if problem.b_order == "row" else b.mT).to(dtype)
    if bias is not None:
        result = result + bias.to(dtype)[:, None]
    return result if problem.d_order == "row" else result.mT
