"""The pack kernel against a copy that moves as many bytes, and against PyTorch's tile op, with nothing in the L2 cache.

Each variant is one CUDA graph of calls over many matrices and as many results, together several times the cache, so
that every call reads and writes DRAM and the host is not in the way.

Also all weights of a model packed together, as a step with packing per step does it.
"""

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.launches import launches
from benchmarks.timing import captured, device, interleaved, ratio
from semisparse import PackedWeights, SemiSparseLinear, ops

SHAPES = ((4096, 1024), (8192, 2048), (11008, 4096), (14336, 4096))
"""N x K of the weights: out features, in features."""

TOY_SHAPES = ((64, 64),)
"""Enough to try the program on a CPU."""

MODEL, MODEL_SHAPES, MODEL_LAYERS = "ViT-L", ((3072, 1024), (1024, 1024), (4096, 1024), (1024, 4096)), 24
"""N x K of the linears in one block of ViT-L, and how many blocks there are."""

LARGEST = (14336, 4096)
"""N x K of the single weight whose rate all packs of a model are compared with."""

FOOTPRINT = 2**29
"""Bytes of input that one graph goes through; the H200's L2 cache holds about a tenth of it."""

VALUES_AND_METADATA = 9 / 16
"""Bytes of a packed 16-bit matrix over those of the dense one."""


def benchmark(out_features: int, in_features: int, rounds: int) -> dict[str, Any]:
    """Microseconds a call of packing one bf16 weight in both directions, of the copy and of the tile op."""
    torch.manual_seed(0)
    weights = _weights(out_features, in_features)
    count, moved = len(weights), _moved(out_features, in_features)
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


def together(rounds: int, toy: bool = False) -> dict[str, Any]:
    """Milliseconds of packing all linears of ViT-L by PackedWeights.pack(), beside the rate of one large pack.

    Args:
        rounds: Interleaved blocks.
        toy: Two small layers.

    Returns:
        Times of all packs, as a training step issues them and replayed from a CUDA graph; bytes that they read and
        write; and the ratio of the replayed time to those bytes over the rate of the large weight's pack.

    Raises:
        RuntimeError: On a GPU, if layers are not packed together.
    """
    torch.manual_seed(0)
    shapes, layers, largest = (TOY_SHAPES * 2, 1, TOY_SHAPES[0]) if toy else (MODEL_SHAPES, MODEL_LAYERS, LARGEST)
    where: dict[str, Any] = {"device": device(), "dtype": torch.bfloat16}
    model = torch.nn.ModuleList([SemiSparseLinear(k, n, bias=False, **where) for n, k in shapes * layers])
    packed, weights = PackedWeights(model), _weights(*largest)
    if packed.pack() < len(model) and device() == "cuda":
        raise RuntimeError(f"only {packed.layers} of {len(model)} layers are packed together: {packed.fallbacks}")
    one = "one pack"
    calls = {
        "all packs": packed.pack,
        "all packs, CUDA graph": captured(packed.pack),
        one: captured(lambda: [ops.pack(weight, weight.dtype, "transposable") for weight in weights]),
    }
    times = interleaved(calls, rounds=rounds)
    all_bytes, one_bytes = sum(_moved(n, k) for n, k in shapes) * layers, _moved(*largest)
    # The ideal time is all_bytes over the rate of the large pack, of which one graph holds len(weights).
    ideal = one_bytes * len(weights) / all_bytes
    slower = {name: ratio(times[name], times[one]) for name in calls if name != one}
    return {
        "model": MODEL,
        "weights": len(model),
        "largest_nk": list(largest),
        "times_ms": {name: timing.as_dict() for name, timing in times.items()},
        "calls_of_one_pack": len(weights),
        "bytes_moved": round(all_bytes),
        "bytes_per_second_of_one_pack": one_bytes * len(weights) / times[one].median_ms * 1000,
        "times_ideal": {
            name: {"median": one.median * ideal, "p20": one.p20 * ideal, "p80": one.p80 * ideal}
            for name, one in slower.items()
        },
        "launches": launches(),
    }


def _weights(out_features: int, in_features: int) -> list[torch.Tensor]:
    """So many weights that they do not fit the cache."""
    count = max(4, (FOOTPRINT if device() == "cuda" else 0) // (2 * out_features * in_features))
    size = out_features, in_features
    return [torch.randn(size, device=device(), dtype=torch.bfloat16) for _ in range(count)]


def _moved(out_features: int, in_features: int) -> float:
    """Bytes of packing: it reads the weight and writes it packed twice. A copy reads and writes the same."""
    return 2 * out_features * in_features * (1 + 2 * VALUES_AND_METADATA)


def _tile_op(weight: torch.Tensor) -> object:
    return torch._sparse_semi_structured_tile(weight, use_cutlass=False)
