"""One linear layer, forward and backward: dense against semisparse and its peers, with the run's own limit.

Every variant is a whole eager call as a training step makes it: bf16 parameters with bias, gradients set to None
before, x.requires_grad, weights pruned and packed in the call. Beside them the single products and the packing are
timed in the same run; from these follows the limit: the ratio that a free packing would reach. Each call is also
replayed from a CUDA graph, which shows what is left when the host is not in the way, and run with backward on the
calling thread (torch.autograd.set_multithreading_enabled), which spares the host the way to another core.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.timing import Timing, captured, interleaved, peak_memory
from semisparse import SemiSparseActivationLinear, SemiSparseLinear, ops
from semisparse.gemm.tuner import tuner

SHAPES = ((13008, 1024, 4096), (13008, 4096, 1024), (16384, 2048, 8192), (16384, 4096, 11008))
"""M x K x N: tokens, in features, out features. ViT-L's MLP as the seed document has it, and two Llama-like MLPs."""

Call = Callable[[], object]


def benchmark(tokens: int, in_features: int, out_features: int, rounds: int) -> dict[str, Any]:
    """Time all variants at one shape; returns times in ms, ratios, limits, peak memory and the errors of peers."""
    torch.manual_seed(0)
    x = torch.randn(tokens, in_features, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    grad_output = torch.randn(tokens, out_features, device="cuda", dtype=torch.bfloat16)
    steps, errors = _steps(x, grad_output)
    parts = _parts(x.detach(), steps, grad_output)
    calls = {name: call for name, (_, call) in steps.items()}
    own = {name: call for name, call in calls.items() if not name.startswith("torchao")}
    ways = {
        "": calls,
        "graph: ": {name: captured(call) for name, call in own.items()},
        "one thread: ": {name: _on_one_thread(call) for name, call in own.items()},
    }
    whole = {f"{way}{name}": call for way, variants in ways.items() for name, call in variants.items()}
    times = interleaved({**whole, **parts}, rounds=rounds)
    memory = {name: peak_memory(call) for name, (_, call) in steps.items()}
    return {
        "mkn": [tokens, in_features, out_features],
        "times_ms": {name: timing.as_dict() for name, timing in times.items()},
        "ratio_to_dense": {
            f"{way}{name}": times[f"{way}dense"].median_ms / times[f"{way}{name}"].median_ms
            for way, variants in ways.items()
            for name in variants
        },
        "limit": _limits(times),
        "tflops": _tflops(times, tokens * in_features * out_features),
        "peak_memory_bytes": memory,
        "layer": {name: repr(layer) for name, (layer, _) in steps.items()},
        "tuning": tuner().state(),
        "errors": errors,
    }


def _steps(
    x: torch.Tensor, grad_output: torch.Tensor
) -> tuple[dict[str, tuple[torch.nn.Module, Call]], dict[str, str]]:
    """Whole forward + backward calls by name, and the error text of each peer that does not run."""
    sizes = x.shape[1], grad_output.shape[1]
    makers: dict[str, Callable[..., torch.nn.Module]] = {
        "dense": torch.nn.Linear,
        "semisparse weight": SemiSparseLinear,
        "semisparse activation": SemiSparseActivationLinear,
        "torchao 0.18 SemiSparseLinear": _torchao,
    }
    steps: dict[str, tuple[torch.nn.Module, Call]] = {}
    errors: dict[str, str] = {}
    for name, maker in makers.items():
        try:
            layer = maker(*sizes, device="cuda", dtype=torch.bfloat16)
            call = _step(layer, x, grad_output)
            call()
            torch.cuda.synchronize()
            steps[name] = layer, call
        except Exception as error:  # a peer that crashes is a row of the table, not the end of the run
            if not name.startswith("torchao"):
                raise
            errors[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return steps, errors


def _torchao(in_features: int, out_features: int, **factory: Any) -> torch.nn.Module:
    from torchao.sparsity.training import SemiSparseLinear as TorchaoLinear

    return TorchaoLinear.from_dense(torch.nn.Linear(in_features, out_features, **factory))


def _step(layer: torch.nn.Module, x: torch.Tensor, grad_output: torch.Tensor) -> Call:
    tensors = [x, *layer.parameters()]

    def call() -> None:
        for tensor in tensors:
            tensor.grad = None
        layer(x).backward(grad_output)

    return call


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
        "part: sparse forward": lambda: ops.packed_linear(x, packed, bias, out_features, "cusparselt"),
        "part: sparse grad_input": lambda: ops.packed_linear(grad_output, packed_t, None, in_features, "cusparselt"),
        "part: pack tokens": lambda: ops.pack_tokens(x, x.dtype),
        "part: bias grad": lambda: grad_output.sum(0),
        "part: sparse tokens forward, bias": lambda: ops.packed_tokens_linear(
            packed_x, weight, bias, tokens, "cusparselt"
        ),
        "part: sparse tokens forward": lambda: ops.packed_tokens_linear(packed_x, weight, None, tokens, "cusparselt"),
        "part: sparse tokens grad_weight": lambda: ops.packed_tokens_grad_weight(
            packed_xt, grad_output, in_features, "cusparselt"
        ),
    }
    if hasattr(torch, "_cslt_sparse_mm"):
        compressed = torch._cslt_compress(ops.prune(weight, weight.dtype, "transposable"))
        parts["peer: torch._cslt_sparse_mm, alg 0"] = lambda: torch._cslt_sparse_mm(
            compressed, x.mT, bias, alg_id=0, transpose_result=True
        )
    return parts


def _limits(times: dict[str, Timing]) -> dict[str, float]:
    """Ratio dense / sparse of the whole call if packing were free, from this run's own products."""
    part = {name.removeprefix("part: "): timing.median_ms for name, timing in times.items()}
    dense = part["dense"]
    saved_weight = part["dense forward"] + part["dense grad_input"] - part["sparse forward"] - part["sparse grad_input"]
    saved_tokens = (
        part["dense forward"]
        + part["dense grad_weight"]
        - part["sparse tokens forward"]
        - part["sparse tokens grad_weight"]
    )
    return {
        "semisparse weight": dense / (dense - saved_weight),
        "semisparse activation": dense / (dense - saved_tokens),
    }


def _tflops(times: dict[str, Timing], multiplications: int) -> dict[str, float]:
    """Dense-equivalent TFLOP/s of each single product (a sparse product skips half of these operations)."""
    return {
        name: 2 * multiplications / timing.median_ms / 1e9
        for name, timing in times.items()
        if name.startswith(("part: dense", "part: sparse", "peer"))
    }
