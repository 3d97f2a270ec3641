"""One linear layer, forward and backward: dense against semisparse and its peers, with the run's own limit.

Every variant is a whole eager call as a training step makes it: bf16 parameters with bias, gradients set to None
before, x.requires_grad, weights pruned and packed in the call. Each call is also replayed from a CUDA graph, which
removes the host's time, and run with backward on the calling thread (torch.autograd.set_multithreading_enabled), which
avoids the switch to another thread.

The limit is the ratio of the same call with its weight packed beforehand (semisparse.reuse_packed), measured in the
same interleaved blocks. A pruned activation cannot be packed beforehand: its limit is estimated from the products
timed alone. That estimate is not a bound. Alone, a product runs at another clock (the GPU is power limited) and with
other data in the cache than inside the call.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

import semisparse
from benchmarks.fresh import fresh_ms
from benchmarks.sampling import product as sampled_product
from benchmarks.timing import Timing, captured, device, interleaved, peak_memory, ratio, synchronize
from semisparse import SemiSparseActivationLinear, SemiSparseLinear, SparseConfig, ops, tuning

SHAPES = ((13008, 1024, 4096), (13008, 4096, 1024), (16384, 2048, 8192), (16384, 4096, 11008))
"""M x K x N: tokens, in features, out features. ViT-L's MLP as the seed document has it, and two Llama-like MLPs."""

SMALL_SHAPES = (
    (4096, 768, 768),
    (4096, 768, 3072),
    (4096, 3072, 768),
    (6304, 1024, 4096),
    (6304, 4096, 1024),
    (16384, 1024, 1024),
    (2048, 2048, 8192),
)
"""M x K x N around the size from which 2:4 pays: BERT-base at 32x128 tokens, ViT-L at batch 32, and two more."""

TOY_SHAPES = ((32, 64, 128),)
"""Enough to try the program on a CPU."""

WEIGHT, ACTIVATION = "semisparse weight", "semisparse activation"
MVUE = "semisparse weight + mvue"
PACKED_BEFORE = "packed beforehand"

Call = Callable[[], object]
Contexts = dict[str, Callable[[], AbstractContextManager[object]]]


def benchmark(tokens: int, in_features: int, out_features: int, rounds: int) -> dict[str, Any]:
    """Time all variants at one shape; returns times in ms, ratios, limits, peak memory and the errors of peers."""
    x, grad_output = inputs(tokens, in_features, out_features)
    fresh = _fresh(x, grad_output)
    steps, errors = _steps(x, grad_output)
    parts = _parts(x.detach(), steps, grad_output)
    calls = {name: call for name, (_, call) in steps.items()}
    own = {name: call for name, call in calls.items() if not name.startswith("torchao")}
    ways = {
        "": calls,
        "one thread: ": {name: _on_one_thread(call) for name, call in own.items()},
        "graph: ": {name: captured(call) for name, call in own.items()},
    }
    whole = {f"{way}{name}": call for way, variants in ways.items() for name, call in variants.items()}
    before, within = _packed_beforehand(*steps[WEIGHT])
    times = interleaved({**whole, **before, **parts}, rounds=rounds, within=within)
    memory = {name: peak_memory(call) for name, (_, call) in steps.items()}
    return {
        "mkn": [tokens, in_features, out_features],
        "times_ms": {name: timing.as_dict() for name, timing in times.items()},
        **_ratios(times, [*whole, *before], fresh),
        "limit_estimated": _estimated_limits(times, fresh),
        "limit_method": "measured",
        "tflops": _tflops(times, tokens * in_features * out_features),
        "peak_memory_bytes": memory,
        "layer": {name: repr(layer) for name, (layer, _) in steps.items()},
        "tuning": tuning.state(),
        "errors": errors,
    }


def _fresh(x: torch.Tensor, grad_output: torch.Tensor) -> dict[str, float]:
    """The dense layer in the fresh process, called in each way."""
    call = step(_layer(torch.nn.Linear, x, grad_output), x, grad_output)
    return fresh_ms({"dense": call, "one thread: dense": _on_one_thread(call), "graph: dense": captured(call)})


def small(tokens: int, in_features: int, out_features: int, rounds: int) -> dict[str, Any]:
    """Dense and 2:4 alone at one shape, eager and from a CUDA graph: where a layer is too small to gain."""
    x, grad_output = inputs(tokens, in_features, out_features)
    fresh = _fresh(x, grad_output)
    layers = {"dense": torch.nn.Linear, WEIGHT: SemiSparseLinear}
    calls = {name: step(_layer(kind, x, grad_output), x, grad_output) for name, kind in layers.items()}
    for call in calls.values():
        call()
    whole = {**calls, **{f"graph: {name}": captured(call) for name, call in calls.items()}}
    times = interleaved(whole, rounds=rounds)
    return {
        "mkn": [tokens, in_features, out_features],
        "times_ms": {name: timing.as_dict() for name, timing in times.items()},
        **_ratios(times, list(whole), fresh),
        "tuning": tuning.state(),
    }


def inputs(tokens: int, in_features: int, out_features: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x, which requires its gradient, and a gradient of y; bf16."""
    torch.manual_seed(0)
    x = torch.randn(tokens, in_features, device=device(), dtype=torch.bfloat16, requires_grad=True)
    return x, torch.randn(tokens, out_features, device=device(), dtype=torch.bfloat16)


def _layer(kind: Callable[..., torch.nn.Module], x: torch.Tensor, grad_output: torch.Tensor) -> torch.nn.Module:
    return kind(x.shape[1], grad_output.shape[1], device=device(), dtype=torch.bfloat16)


def _steps(
    x: torch.Tensor, grad_output: torch.Tensor
) -> tuple[dict[str, tuple[torch.nn.Module, Call]], dict[str, str]]:
    """Whole forward + backward calls by name, and the error text of each peer that does not run."""
    makers: dict[str, Callable[..., torch.nn.Module]] = {
        "dense": torch.nn.Linear,
        WEIGHT: SemiSparseLinear,
        MVUE: partial(SemiSparseLinear, config=SparseConfig(grad_output="mvue")),
        ACTIVATION: SemiSparseActivationLinear,
        "torchao 0.18 SemiSparseLinear": _torchao,
    }
    steps: dict[str, tuple[torch.nn.Module, Call]] = {}
    errors: dict[str, str] = {}
    for name, maker in makers.items():
        try:
            layer = _layer(maker, x, grad_output)
            call = step(layer, x, grad_output)
            call()
            synchronize()
            steps[name] = layer, call
        except Exception as error:  # a peer that crashes is a note below the table, not the end of the run
            if not name.startswith("torchao"):
                raise
            errors[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return steps, errors


def _torchao(in_features: int, out_features: int, **factory: Any) -> torch.nn.Module:
    from torchao.sparsity.training import SemiSparseLinear as TorchaoLinear

    return TorchaoLinear.from_dense(torch.nn.Linear(in_features, out_features, **factory))


def step(layer: torch.nn.Module, x: torch.Tensor, grad_output: torch.Tensor) -> Call:
    """Forward and backward of layer; gradients are set to None before."""
    tensors = [x, *layer.parameters()]

    def call() -> None:
        for tensor in tensors:
            tensor.grad = None
        layer(x).backward(grad_output)

    return call


def _packed_beforehand(layer: torch.nn.Module, call: Call) -> tuple[dict[str, Call], Contexts]:
    """The calls that find their weight packed, and the contexts that they are timed in."""
    with semisparse.reuse_packed(layer):
        graph = captured(call)  # reads the layer's buffers, which stay in place
    before = {
        PACKED_BEFORE: call,
        f"one thread: {PACKED_BEFORE}": _on_one_thread(call),
        f"graph: {PACKED_BEFORE}": graph,
    }
    return before, {name: lambda: semisparse.reuse_packed(layer) for name in before}


def _on_one_thread(call: Call) -> Call:
    def alone() -> None:
        with torch.autograd.set_multithreading_enabled(False):
            call()

    return alone


def _parts(
    x: torch.Tensor, steps: dict[str, tuple[torch.nn.Module, Call]], grad_output: torch.Tensor
) -> dict[str, Call]:
    """The single products and packings of the variants, each on its own."""
    layer = steps["dense"][0]
    weight, bias = layer.weight.detach(), layer.bias.detach()
    tokens, (out_features, in_features) = x.shape[0], weight.shape
    packed, packed_t = ops.pack(weight, weight.dtype, "transposable")
    packed_x, packed_xt = ops.pack_tokens(x, x.dtype)
    parts: dict[str, Call] = {
        "part: dense forward": lambda: F.linear(x, weight, bias),
        "part: dense grad_input": lambda: grad_output @ weight,
        "part: dense grad_weight": lambda: grad_output.mT @ x,
        "part: pack weight": lambda: ops.pack(weight, weight.dtype, "transposable"),
        "part: sparse forward": lambda: ops.packed_matmul(x, packed, bias, out_features, "cusparselt"),
        "part: sparse grad_input": lambda: ops.packed_matmul(grad_output, packed_t, None, in_features, "cusparselt"),
        "part: pack tokens": lambda: ops.pack_tokens(x, x.dtype),
        "part: bias grad": lambda: grad_output.sum(0),
        "part: sparse tokens forward, bias": lambda: ops.packed_tokens_matmul(
            packed_x, weight, bias, tokens, "cusparselt"
        ),
        "part: sparse tokens forward": lambda: ops.packed_tokens_matmul(packed_x, weight, None, tokens, "cusparselt"),
        "part: sparse tokens grad_weight": lambda: ops.packed_tokens_grad_weight(
            packed_xt, grad_output, in_features, "cusparselt"
        ),
        "part: sample": lambda: ops.pack_sample(grad_output, None, False),
        "part: sample and bias grad": lambda: ops.pack_sample(grad_output, None, True),
        "part: sparse sampled grad_weight": sampled_product(x, grad_output, None),
    }
    if hasattr(torch, "_cslt_sparse_mm") and device() == "cuda":
        compressed = torch._cslt_compress(ops.prune(weight, weight.dtype, "transposable"))
        parts["peer: torch._cslt_sparse_mm, alg 0"] = lambda: torch._cslt_sparse_mm(
            compressed, x.mT, bias, alg_id=0, transpose_result=True
        )
    return parts


def _ratios(times: dict[str, Timing], names: list[str], fresh: dict[str, float]) -> dict[str, dict[str, Any]]:
    """How many times faster than dense, called in the same way, each variant is; and its limit where it was timed."""
    found = {}
    for name in names:
        way = "".join(name.rpartition(": ")[:2])
        dense = f"{way}dense"
        found[name] = ratio(times[dense], times[name], None if name == dense else fresh.get(dense))
    limits = {
        name.removesuffix(PACKED_BEFORE) + WEIGHT: one.median
        for name, one in found.items()
        if name.endswith(PACKED_BEFORE)
    }
    return {
        "fresh_ms": fresh,
        "ratio_to_dense": {name: one.median for name, one in found.items()},
        "ratio_spread": {name: asdict(one) for name, one in found.items()},
        "limit": limits,
    }


def _estimated_limits(times: dict[str, Timing], fresh: dict[str, float]) -> dict[str, float]:
    """Ratio dense / sparse of the whole call if packing were free, estimated from the products timed alone.

    What is saved is taken off the dense call beside them; the ratio is to dense of the fresh process, if that is known.
    """
    part = {name.removeprefix("part: "): timing.median_ms for name, timing in times.items()}
    dense = part["dense"]
    saved_weight = part["dense forward"] + part["dense grad_input"] - part["sparse forward"] - part["sparse grad_input"]
    saved_tokens = (
        part["dense forward"]
        + part["dense grad_weight"]
        - part["sparse tokens forward"]
        - part["sparse tokens grad_weight"]
    )
    base = fresh.get("dense", dense)
    return {WEIGHT: base / (dense - saved_weight), ACTIVATION: base / (dense - saved_tokens)}


def _tflops(times: dict[str, Timing], multiplications: int) -> dict[str, float]:
    """Dense-equivalent TFLOP/s of each single product (a sparse product skips half of these operations)."""
    return {
        name: 2 * multiplications / timing.median_ms / 1e9
        for name, timing in times.items()
        if name.startswith(("part: dense", "part: sparse", "peer"))
    }
