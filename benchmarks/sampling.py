"""The parts of grad_output="mvue": the sample kernel against a copy that moves as many bytes, and the product after it.

The kernel and the copy are CUDA graphs of calls over several gradients, together several times the L2 cache, as in
pack.py.
"""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from benchmarks.pack import FOOTPRINT, VALUES_AND_METADATA
from benchmarks.timing import captured, device, interleaved, ratio
from semisparse import ops
from semisparse.formats.layout import SPARSE_MULTIPLE, round_up
from semisparse.gemm import problem
from semisparse.ops.products import multiply, padded

SAMPLE, SAMPLE_BIAS, COPY = "sample", "sample and bias gradient", "copy"
DENSE_PRODUCT, SPARSE_PRODUCT, WHOLE = "dense grad_weight", "sparse sampled grad_weight", "sample and product"


def benchmark(x: Tensor, grad_output: Tensor, rounds: int) -> dict[str, Any]:
    """Milliseconds a call of each part at one shape; the seed is a tensor, as a schedule sets it.

    Args:
        x: M x K, bf16.
        grad_output: dy, M x N, bf16.
        rounds: Interleaved blocks per part.

    Returns:
        Times; the share of the copy's rate that the kernel reaches, without and with the bias gradient; and how many
        times faster than dense the sparse product is, alone and with its sampling.
    """
    seed = torch.tensor(1, device=grad_output.device)
    gradients = [grad_output, *(torch.randn_like(grad_output) for _ in range(_count(grad_output) - 1))]
    moved = bytes_moved(*grad_output.shape)
    sources = [torch.ones(moved // 2, device=grad_output.device, dtype=torch.uint8) for _ in gradients]
    # A list holds the results of one graph apart until the last of them is there.
    calls: dict[str, Callable[[], object]] = {
        SAMPLE: captured(lambda: [ops.pack_sample(one, seed, False) for one in gradients]),
        SAMPLE_BIAS: captured(lambda: [ops.pack_sample(one, seed, True) for one in gradients]),
        COPY: captured(lambda: [source.clone() for source in sources]),
        DENSE_PRODUCT: lambda: grad_output.mT @ x,
        SPARSE_PRODUCT: product(x, grad_output, seed),
        WHOLE: lambda: ops.sampled_grad_weight(grad_output, x, seed, False, "auto"),
    }
    times = interleaved(calls, rounds=rounds)
    calls_of_one = {name: len(gradients) if name in (SAMPLE, SAMPLE_BIAS, COPY) else 1 for name in calls}
    compared = {SAMPLE: COPY, SAMPLE_BIAS: COPY, SPARSE_PRODUCT: DENSE_PRODUCT, WHOLE: DENSE_PRODUCT}
    return {
        "ms": {name: timing.median_ms / calls_of_one[name] for name, timing in times.items()},
        "bytes_moved": moved,
        "faster": {name: asdict(ratio(times[base], times[name])) for name, base in compared.items()},
    }


def bytes_moved(tokens: int, out_features: int) -> int:
    """Bytes of sampling: it reads dy and writes the packed sample; sums for the bias are not counted."""
    return round(2 * tokens * out_features * (1 + VALUES_AND_METADATA))


def product(x: Tensor, grad_output: Tensor, seed: Tensor | None) -> Callable[[], object]:
    """dW from a gradient that was sampled and packed before; masked dense without a GPU."""
    if device() != "cuda":
        drawn = ops.sample(grad_output, seed)
        return lambda: drawn.mT @ x
    (tokens, out_features), in_features = grad_output.shape, x.shape[1]
    packed, _ = ops.pack_sample(grad_output, seed, False)
    asked = problem.sampled_weight(tokens, out_features, in_features, x.dtype)
    b = padded(x, round_up(tokens, SPARSE_MULTIPLE))
    return lambda: multiply(asked, packed, b, x.new_empty(asked.d_shape), None, "cusparselt")


def _count(grad_output: Tensor) -> int:
    """So many gradients that they do not fit the cache."""
    return max(1, -(-FOOTPRINT // (2 * grad_output.numel()))) if device() == "cuda" else 2
