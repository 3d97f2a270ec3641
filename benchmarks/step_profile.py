"""Where the milliseconds of a compiled training step go on the GPU, by kind of kernel, and their floors.

The floor of a product is its FLOPs at the data sheet's peak for its precision and sparsity; the floor of a pass over
tensors is its bytes at the data sheet's bandwidth. No kernel reaches either: a GPU under its power limit runs products
at well under the peak. A kind's floor is given where its work follows from the swapped layers' sizes alone.
"""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from benchmarks import float8
from benchmarks.compare import DENSE, ROWS, forget_compiled, model_of
from benchmarks.models import CARDS, sparsified
from benchmarks.timing import kernels_of, synchronize

SPARSE, DENSE_FP8, PRODUCTS = "sparse products", "dense fp8 products", "dense products"
AMAX, ROUNDING, RESCALING = "largest magnitudes", "rounding to e4m3", "rescaling"
PACKING, SAMPLING = "pruning and packing", "sampling"
KINDS = (
    (SPARSE, r"sparse|spmma|sp_gemm"),
    (DENSE_FP8, r"nvjet_\w*_q|e4m3.*gemm|gemm.*e4m3|f8f8"),
    (AMAX, r"^amax|scale_of"),
    (ROUNDING, r"^quantise"),
    (RESCALING, r"^rescale"),
    (PACKING, r"^prune_pack"),
    (SAMPLING, r"^sample_pack"),
    ("attention", r"sdpa|flash|fmha|attention"),
    ("optimizer", r"multi_tensor|adam"),
    (PRODUCTS, r"nvjet|gemm|cutlass|cublas"),
    ("fused pointwise and reductions", r"^triton_"),
)
"""Kind -> pattern of the kernels' names; the first that matches counts. cuBLAS writes e4m3 as q and e5m2 as r."""
OTHER = "other"
ROW_NAMES = ("float8", "2:4", "fp8-2:4")
STEPS = 3
PEAK_TFLOPS = {"bf16": 989.0, "fp8": 1979.0}
"""Dense, of an H100 SXM or an H200 by NVIDIA's data sheet; twice as much with 2:4 sparsity."""
BANDWIDTH = {"H100": 3.35e12, "H200": 4.8e12}
"""Bytes per second by NVIDIA's data sheet (SXM)."""


def benchmark(card: str, rows: Sequence[str], toy: bool = False) -> dict[str, Any]:
    """Profile one step of each row.

    Args:
        card: A key of CARDS that ends with an optimizer step.
        rows: Keys of benchmarks.compare.ROWS.
        toy: Run at toy size, on any device; the figures mean nothing.

    Returns:
        By row: milliseconds of the GPU, launches, and the longest kernels with their milliseconds; and floors in ms.
    """
    forget_compiled()
    chosen = CARDS[card]
    names = sparsified(chosen, toy)[1].swapped
    found, tokens = {}, 0
    for name in (None, *sorted(rows, key=lambda name: ROWS[name].config is None)):
        row = None if name is None else ROWS[name]
        built = model_of(row, chosen, names, toy)
        if row is None:
            sizes = [tuple(built.get_submodule(one).weight.shape) for one in names]
            tokens = _tokens(built, chosen.step(built, built, toy), names[0])
        step = chosen.step(chosen.compile(built), built, toy)
        found[DENSE if row is None else row.title] = _profiled(step)
        del built, step
    return {
        "card": card,
        "label": chosen.label,
        "layers": len(names),
        "tokens": tokens,
        "rows": found,
        "floors_ms": floors(tokens, sizes),
        "torchao": float8.checked_version() if "float8" in rows else None,
    }


def floors(tokens: int, sizes: Sequence[tuple[int, ...]]) -> dict[str, float]:
    """Least milliseconds of the swapped layers' work per step, by precision and kind.

    Args:
        tokens: M of each layer.
        sizes: N, K of each layer.
    """
    flops = sum(2.0 * tokens * n * k for n, k in sizes)
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "H100"
    rate = next((value for key, value in BANDWIDTH.items() if key in name), BANDWIDTH["H100"])
    weights = sum(float(n * k) for n, k in sizes)
    return {
        "three bf16 products": 3 * flops / PEAK_TFLOPS["bf16"] / 1e9,
        "two bf16 products with 2:4": flops / PEAK_TFLOPS["bf16"] / 1e9,
        "three fp8 products": 3 * flops / PEAK_TFLOPS["fp8"] / 1e9,
        "two fp8 products with 2:4": flops / PEAK_TFLOPS["fp8"] / 1e9,
        "one fp8 product": flops / PEAK_TFLOPS["fp8"] / 1e9,
        # Read once for the largest magnitude, once to prune, round and pack both ways: 1/2 + 1/8 byte each.
        "packing of weights in fp8": weights * (2 + 2 + 2 * 0.625) / rate * 1e3,
        # Read twice, written twice: gradients of all outputs; inputs are shared between layers and not counted.
        "rounding of output gradients": sum(6.0 * tokens * n for n, _ in sizes) / rate * 1e3,
    }


def _tokens(model: nn.Module, step: Any, name: str) -> int:
    """M of the named layer."""
    seen: list[int] = []
    layer = model.get_submodule(name)
    handle = layer.register_forward_pre_hook(lambda _, given: seen.append(given[0].numel() // given[0].shape[-1]))
    try:
        step()
    finally:
        handle.remove()
    return seen[0]


def _profiled(step: Any) -> dict[str, Any]:
    for _ in range(3):
        step()
    synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(STEPS):
            step()
        synchronize()
    kernels = sorted(kernels_of(profile.events()))
    longest: Counter[str] = Counter()
    for start, end, name in kernels:
        longest[name] += (end - start) / 1e3 / STEPS
    return {
        "total_ms": longest.total(),
        "launches": len(kernels) / STEPS,
        "longest": longest.most_common(60),
        "timeline": timeline(kernels[len(kernels) - len(kernels) // STEPS :]),
    }


def timeline(kernels: Sequence[tuple[float, float, str]]) -> list[tuple[float, float, str]]:
    """When which kind of kernels ran: start and end in milliseconds since the first one's start, and the kind.

    Args:
        kernels: Start and end in microseconds and name, by start. Those of one kind that follow each other within 50
            microseconds are joined.
    """
    found: list[tuple[float, float, str]] = []
    for start, end, name in kernels:
        begin, stop, kind = (start - kernels[0][0]) / 1e3, (end - kernels[0][0]) / 1e3, kind_of(name)
        if found and found[-1][2] == kind and begin - found[-1][1] <= 0.05:
            found[-1] = found[-1][0], max(found[-1][1], stop), kind
        else:
            found.append((begin, stop, kind))
    return found


def kind_of(kernel: str) -> str:
    """The kind of a kernel, by its name."""
    return next((kind for kind, pattern in KINDS if re.search(pattern, kernel)), OTHER)


def by_kind(row: dict[str, Any]) -> dict[str, float]:
    """Milliseconds of a profiled row by kind; what is not among its longest kernels is OTHER."""
    spent: Counter[str] = Counter()
    for name, milliseconds in row["longest"]:
        spent[kind_of(name)] += milliseconds
    spent[OTHER] += row["total_ms"] - spent.total()
    return dict(spent)
