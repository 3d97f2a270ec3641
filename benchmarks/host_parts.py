"""Where the host time of one eager 2:4 layer goes: each part of its forward and backward, timed by itself.

The layer is one of the stack of host.py. Timed by itself, a part runs with warm caches and with nothing else around
it; a part that contains another one is given without it, as a difference. What the parts do not cover is mostly the
autograd engine: its queue, the switch to the thread of the device, and the accumulation of gradients.
"""

from collections.abc import Callable
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.host import FEATURES, TOKENS, rounds_of
from benchmarks.launches import launches
from benchmarks.timing import device, summary, synchronize
from semisparse import SemiSparseLinear, autograd, ops, routes
from semisparse.operands import check_operands, compute_dtype, in_dtype
from semisparse.tracing import recording

ITERATIONS = 100
MASK, BACKEND = "transposable", "auto"

CALL, CHECKS, PRODUCT, BOTH_OPS = "nn.Module call", "checks", "product op", "pack_linear op (pack and product)"
PACK, APPLY, BACKWARD = "pack op", "autograd apply", "backward function"
GRADIENT, DENSE, WHOLE = "product of dW", "nn.Linear, forward + backward", "2:4, forward + backward"

Call = Callable[[], object]

EXPLAINED = {
    CALL: "of a module that does nothing",
    CHECKS: "operands, dtype, transform, route",
    BOTH_OPS: "the forward's only op",
    APPLY: "of a Function that saves as much and does nothing",
    f"{BACKWARD}, Python": "without its two products",
    PRODUCT: "dx, the backward's op",
    GRADIENT: "dW = dy^T x",
    "not covered": "autograd engine and its threads, accumulating gradients",
}
"""Parts that add up to the whole, in order, and what each one is."""


class _Nothing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


class _Idle(torch.autograd.Function):
    """Takes and saves what the layer's own Function does."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        ctx.save_for_backward(inputs[0], inputs[1])
        ctx.mask, ctx.backend = inputs[3], inputs[6]
        return inputs[-1].detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        return (None,) * 8


def benchmark(rounds: int, toy: bool = False) -> dict[str, Any]:
    """Microseconds of host time of one eager layer's forward and backward, by part.

    Args:
        rounds: Interleaved rounds.
        toy: Few iterations.

    Returns:
        Under "timed", what was timed, with p20 and p80; under "parts", parts that add up to the whole.
    """
    timed = rounds_of(_calls(), rounds=rounds, iterations=2 if toy else ITERATIONS)
    us = {name: summary(values).median for name, values in timed.items()}
    parts = {name: us[name] for name in (CALL, CHECKS, BOTH_OPS, APPLY)}
    parts[f"{BACKWARD}, Python"] = us[BACKWARD] - us[PRODUCT] - us[GRADIENT]
    parts |= {name: us[name] for name in (PRODUCT, GRADIENT)}
    parts["not covered"] = us[WHOLE] - sum(parts.values())
    return {
        "layer": {"in_features": FEATURES, "out_features": FEATURES, "tokens": TOKENS},
        "rounds": rounds,
        "timed": {name: asdict(summary(values)) for name, values in timed.items()},
        "parts": parts,
        "launches": launches(),
    }


def _calls() -> dict[str, Call]:
    torch.manual_seed(0)
    where: dict[str, Any] = {"device": device(), "dtype": torch.bfloat16}
    x = torch.randn(TOKENS, FEATURES, requires_grad=True, **where)
    grad = torch.randn(TOKENS, FEATURES, **where)
    layers = {DENSE: nn.Linear, WHOLE: SemiSparseLinear}
    made = {name: kind(FEATURES, FEATURES, bias=False, **where) for name, kind in layers.items()}
    weight, nothing = made[WHOLE].weight, _Nothing()
    calls: dict[str, Call] = {name: _whole(layer, x, grad) for name, layer in made.items()}
    calls |= {CALL: lambda: nothing(x), CHECKS: lambda: _checks(x, weight)}
    calls |= _work(x.detach(), weight.detach(), grad)
    idle = x, weight, None, MASK, None, None, BACKEND, torch.empty_like(grad)
    calls[APPLY] = lambda: autograd.apply(_Idle, *idle)
    for call in calls.values():
        for _ in range(3):
            call()
    synchronize()
    return calls


def _whole(layer: nn.Module, x: Tensor, grad: Tensor) -> Call:
    weight = layer.weight

    def call() -> None:
        x.grad = weight.grad = None
        layer(x).backward(grad)

    return call


def _checks(x: Tensor, weight: Tensor) -> None:
    """What functional.semi_sparse_linear asks before it starts."""
    check_operands(x, weight, None)
    dtype = compute_dtype(x, weight)
    routes.transform_at_work(BACKEND)
    routes.packs(weight, dtype, BACKEND)
    torch.compiler.is_compiling()
    recording()
    in_dtype(dtype, x)
    torch.is_grad_enabled()


def _work(x: Tensor, weight: Tensor, grad: Tensor) -> dict[str, Call]:
    """The ops, and the function of the backward, without autograd around them."""
    packed_t = ops.pack(weight, weight.dtype, MASK)[1]
    ctx = SimpleNamespace(
        needs_input_grad=(True, True, False),
        saved_tensors=(x, packed_t, None),
        sampled=False,
        mask=MASK,
        backend=BACKEND,
        weight_dtype=weight.dtype,
        weight_shape=weight.shape,
    )

    def no_grad(call: Call) -> Call:
        def alone() -> object:
            with torch.no_grad():
                return call()

        return alone

    calls: dict[str, Call] = {
        PACK: lambda: ops.pack(weight, weight.dtype, MASK),
        BOTH_OPS: lambda: ops.pack_linear(x, weight, None, MASK, None, None, BACKEND),
        PRODUCT: lambda: ops.packed_matmul(grad, packed_t, None, FEATURES, BACKEND),
        GRADIENT: lambda: grad.mT @ x,
    }
    # The engine calls a backward without recording; the function looks at that.
    calls[BACKWARD] = no_grad(lambda: autograd.PackLinear.backward(ctx, grad))
    return calls
