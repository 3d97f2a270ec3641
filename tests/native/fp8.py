"""Arguments of the ops of fp8, and the kernels that their calls need."""

from typing import Any

import torch
from torch import Tensor

from semisparse import ops
from semisparse.formats.layout import FP8
from semisparse.native.structures import DTYPE_CODES, LaunchKind
from tests.native.conftest import Bench

OPS = ("quantise", "pack_fp8", "unpack_fp8", "fp8_product", "fp8_dense_product", "rescale", "rescale_")
BF16 = torch.bfloat16
M, N, K = 16, 96, 64


def codes(rows: int, columns: int) -> Tensor:
    """Small integers: every sum of products is exact."""
    return torch.randint(-4, 5, (rows, columns)).float().to(FP8)


def arguments(name: str) -> tuple[Any, ...]:
    """Of an op, for a call that C++ starts once its kernels are there."""
    weight, scale = torch.randn(N, K).to(BF16), torch.tensor(0.25)
    return {
        "quantise": lambda: (torch.randn(13, K).to(BF16), True, True),
        "pack_fp8": lambda: (weight, "transposable", None),
        "unpack_fp8": lambda: (ops.pack_fp8(weight, "row", None)[0], N, K),
        "fp8_product": lambda: (codes(M, K), ops.pack_fp8(codes(N, K).to(BF16), "row", None)[0], N, "auto", BF16),
        "fp8_dense_product": lambda: (codes(M, K), codes(N, K), BF16, None, scale),
        "rescale": lambda: (torch.randn(M, N).to(BF16), scale, scale * 2, torch.randn(N), 13, torch.float16),
        "rescale_": lambda: (torch.randn(M, N).to(BF16), scale, scale * 2, torch.randn(N)),
    }[name]()


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
    elif name == "unpack_fp8":
        bench.hot.launch(LaunchKind.UNPACK, (None, FP8), (*given[1:], 0))
    elif name.startswith("rescale"):
        rows, dtype = given[4:] or (first.shape[0], first.dtype)
        bias = given[3]
        sizes = rows, first.shape[1], 0 if bias is None else DTYPE_CODES[bias.dtype]
        bench.hot.launch(LaunchKind.RESCALE, (first.dtype, dtype), sizes, given=(bias is not None, False))
