"""The pack kernel against a copy that moves as many bytes, and against PyTorch's tile op, with nothing in the L2 cache.

Each variant is one CUDA graph of calls over many matrices and as many results, together several times the cache, so
that every call reads and writes DRAM and the host is not in the way.
"""

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.timing import captured, device, interleaved
from semisparse import ops

SHAPES = ((4096, 1024), (8192, 2048), (11008, 4096), (14336, 4096))
"""N x K of the weights: out features, in features."""

TOY_SHAPES = ((64, 64),)
"""Enough to try the program on a CPU."""

FOOTPRINT = 2**29
"""Bytes of input that one graph goes through; the H200's L2 cache holds about a tenth of it."""

VALUES_AND_METADATA = 9 / 16
"""Bytes of a packed 16-bit matrix over those of the dense one."""


def benchmark(out_features: int, in_features: int, rounds: int) -> dict[str, Any]:
    """Microseconds a call of packing one bf16 weight in both directions, of the copy and of the tile op."""
    torch.manual_seed(0)
    size = out_features, in_features
    count = max(4, (FOOTPRINT if device() == "cuda" else 0) // (2 * out_features * in_features))
    weights = [torch.randn(size, device=device(), dtype=torch.bfloat16) for _ in range(count)]
    # Packing reads the weight and writes it packed twice; a copy reads and writes the same.
    moved = 2 * out_features * in_features * (1 + 2 * VALUES_AND_METADATA)
    sources = [torch.empty(round(moved / 2), device=device(), dtype=torch.uint8).fill_(1) for _ in range(count)]
    variants: dict[str, Callable[[torch.Tensor], object]] = {
        "pack": lambda weight: ops.pack(weight, weight.dtype, "transposable"),
        "torch tile op": _tile_op if device() == "cuda" else torch.clone,
    }
    # A list holds the results of one graph apart until the last of them is there.
    graphs = {name: captured(lambda call=call: [call(weight) for weight in weights]) for name, call in variants.items()}
    graphs["copy"] = captured(lambda: [source.clone() for source in sources])
    times = {name: timing.median_ms * 1000 / count for name, timing in interleaved(graphs, rounds=rounds).items()}
    return {
        "nk": [out_features, in_features],
        "microseconds": times,
        "bytes_moved": round(moved),
        "rate_of_copy": times["copy"] / times["pack"],
        "faster_than_tile_op": times["torch tile op"] / times["pack"],
    }


def _tile_op(weight: torch.Tensor) -> object:
    return torch._sparse_semi_structured_tile(weight, use_cutlass=False)
