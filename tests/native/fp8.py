"""Arguments of the ops of fp8, and the kernels that their calls need."""

from typing import Any

import torch
from torch import Tensor

from semisparse import ops
from semisparse.formats.layout import FP8
from semisparse.native.structures import DTYPE_CODES, LaunchKind
from semisparse.ops.fp8_packed import sums_dtype
from semisparse.testing import small_integers
from tests.native.conftest import Bench
from tests.native.hot import SUM_ROWS

OPS = (
    "quantise", "pack_fp8", "unpack_fp8", "fp8_product", "fp8_dense_product", "rescale", "rescale_", "sample_fp8",
    "fp8_sampled_product", "fp8_sampled_grad_weight",
)  # fmt: skip
PLANNED = ("fp8_product", "fp8_sampled_product", "fp8_sampled_grad_weight")
"""Ops whose product Python prepares as it answers a call."""
BF16 = torch.bfloat16
M, N, K = 16, 96, 64


def codes(rows: int, columns: int) -> Tensor:
    """Small integers: every sum of products is exact."""
    return torch.randint(-4, 5, (rows, columns)).float().to(FP8)


def arguments(name: str) -> tuple[Any, ...]:
    """Of an op, for a call that C++ starts once its kernels are there."""
    weight, scale, seed = torch.randn(N, K).to(BF16), torch.tensor(0.25), torch.tensor(-7)
    gradient = small_integers((20, N), limit=4, dtype=BF16)
    return {
        "quantise": lambda: (torch.randn(13, K).to(BF16), True, True),
        "pack_fp8": lambda: (weight, "transposable", None),
        "unpack_fp8": lambda: (ops.pack_fp8(weight, "row", None)[0], N, K),
        "fp8_product": lambda: (codes(M, K), ops.pack_fp8(codes(N, K).to(BF16), "row", None)[0], N, "auto", BF16),
        "sample_fp8": lambda: (gradient, seed, True, torch.float32),
        "fp8_sampled_product": lambda: (
            ops.sample_fp8(gradient, seed, False, None)[1],
            codes(K, 32),
            N,
            "auto",
            torch.float32,
        ),
        "fp8_sampled_grad_weight": lambda: (gradient, codes(K, 32), scale, seed, True, torch.float32, "auto", BF16),
        "fp8_dense_product": lambda: (codes(M, K), codes(N, K), BF16, None, scale),
        "rescale": lambda: (torch.randn(M, N).to(BF16), scale, scale * 2, torch.randn(N), 13, torch.float16),
        "rescale_": lambda: (torch.randn(M, N).to(BF16), scale, scale * 2, torch.randn(N)),
    }[name]()


def prepare_sample(bench: Bench, gradient: Tensor, seed: bool, rows: bool, bias_dtype: torch.dtype | None) -> None:
    """Hand over the kernels of sample_fp8."""
    sizes = (*gradient.shape, gradient.stride(0))
    bench.hot.launch(LaunchKind.LARGEST, (gradient.dtype, None), sizes)
    given = seed, bias_dtype is not None
    bench.hot.launch(LaunchKind.SAMPLE_FP8, (gradient.dtype, FP8 if rows else None), sizes, given=given)
    if bias_dtype is not None:
        bench.hot.launch(LaunchKind.SUM_ROWS, (torch.float32, bias_dtype), (SUM_ROWS, gradient.shape[1], 0))


def prepare_kernels(bench: Bench, name: str, given: tuple[Any, ...]) -> None:
    """Hand over what Python would on CUDA."""
    first = given[0]
    if name in ("quantise", "pack_fp8"):
        sizes = (*first.shape, first.stride(0))
        bench.hot.launch(LaunchKind.LARGEST, (first.dtype, None), sizes)
        if name == "quantise":
            bench.hot.launch(LaunchKind.QUANTISE, (first.dtype, None), sizes, given=given[1:])
        else:
            held = given[2] is not None, False
            bench.hot.launch(LaunchKind.PACK_FP8, (first.dtype, None), sizes, given[1], held)
    elif name in ("sample_fp8", "fp8_sampled_grad_weight"):
        seed, rows, bias_dtype = given[1:4] if name == "sample_fp8" else given[3:6]
        prepare_sample(bench, first, seed is not None, rows, bias_dtype)
        if name == "fp8_sampled_grad_weight":
            dtype, size = given[7], (first.shape[1], given[1].shape[0], 0)
            bench.hot.launch(LaunchKind.RESCALE, (sums_dtype(dtype), dtype), size)
    elif name == "unpack_fp8":
        bench.hot.launch(LaunchKind.UNPACK, (None, FP8), (*given[1:], 0))
    elif name.startswith("rescale"):
        rows, dtype = given[4:] or (first.shape[0], first.dtype)
        bias = given[3]
        sizes = rows, first.shape[1], 0 if bias is None else DTYPE_CODES[bias.dtype]
        bench.hot.launch(LaunchKind.RESCALE, (first.dtype, dtype), sizes, given=(bias is not None, False))
