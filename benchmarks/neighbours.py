"""A compiled linear layer between pointwise operations: what remains when the compiler may fuse around it.

Each row is silu -> linear -> silu, forward and backward, compiled as a whole. The same two silu without the linear are
timed beside it, and their time is taken off: the rest is what the layer costs inside a compiled model. In float8 and
fp8 the casts may be fused into the neighbours, and count as part of the layer.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from benchmarks import float8
from benchmarks.compare import DENSE, ROWS, SPARSE, Row, forget_compiled, layer_of
from benchmarks.fresh import fresh_ms
from benchmarks.launches import launches
from benchmarks.linear import inputs
from benchmarks.timing import Timing, interleaved, summary
from semisparse import tuning

Call = Callable[[], object]
SHAPES = ((16384, 4096, 11008), (16384, 2048, 8192))
"""M x K x N."""
ROW_NAMES = ("float8", "2:4", "fp8", "fp8-2:4")
ALONE = "neighbours alone"


def benchmark(tokens: int, in_features: int, out_features: int, rows: Sequence[str], rounds: int) -> dict[str, Any]:
    """Time all rows at one shape.

    Args:
        tokens: M.
        in_features: K.
        out_features: N.
        rows: Keys of benchmarks.compare.ROWS; none of them packs per step.
        rounds: Interleaved blocks per row.

    Returns:
        Times, and how many times faster than dense each row is once the neighbours are taken off.
    """
    forget_compiled()
    x, grad_output = inputs(tokens, in_features, out_features)
    calls = {ALONE: _alone(x, grad_output)}
    # torchao comes last: converting a model changes how torch.compile writes code.
    asked = sorted((ROWS[name] for name in rows), key=lambda row: row.config is None)
    fresh: dict[str, float] = {}
    for row in (None, *asked):
        title = DENSE if row is None else row.title
        calls[title] = _step(_layer(row, in_features, out_features), x, grad_output)
        calls[title]()
        if row is None:
            fresh = fresh_ms(calls)
    times = interleaved(calls, rounds=rounds)
    ratios = {name: _ratio(times, name, fresh if name in SPARSE else {}) for name in calls if name != ALONE}
    return {
        "mkn": [tokens, in_features, out_features],
        "times_ms": {name: timing.as_dict() for name, timing in times.items()},
        "fresh_ms": fresh,
        "ratio_to_dense": {name: spread["median"] for name, spread in ratios.items()},
        "ratio_spread": ratios,
        "torchao": float8.checked_version() if "float8" in rows else None,
        "launches": launches(),
        "tuning": tuning.state(),
    }


def _layer(row: Row | None, in_features: int, out_features: int) -> nn.Module:
    model = nn.Sequential(nn.SiLU(), layer_of(row, in_features, out_features), nn.SiLU())
    return float8.converted(model, ["1"]) if row is not None and row.config is None else model


def _step(model: nn.Module, x: torch.Tensor, grad_output: torch.Tensor) -> Call:
    compiled, parameters = torch.compile(model), list(model.parameters())

    def step() -> None:
        for tensor in (x, *parameters):
            tensor.grad = None
        compiled(x).backward(grad_output)

    return step


def _alone(x: torch.Tensor, grad_output: torch.Tensor) -> Call:
    """The two silu: one of x's size, one of the output's."""
    z, grad_x = torch.randn_like(grad_output).requires_grad_(), torch.randn_like(x)
    silu = torch.compile(lambda one, other: (nn.functional.silu(one), nn.functional.silu(other)))

    def step() -> None:
        x.grad = z.grad = None
        torch.autograd.backward(silu(x, z), (grad_x, grad_output))

    return step


def _ratio(times: dict[str, Timing], name: str, fresh: dict[str, float]) -> dict[str, float]:
    """Of dense to this row, both without the neighbours; to dense and its neighbours in a fresh process, if known."""
    blocks = zip(*(times[one].blocks_ms for one in (DENSE, name, ALONE)), strict=True)
    known = fresh[DENSE] - fresh[ALONE] if fresh else None
    return asdict(
        summary([((dense - alone) if known is None else known) / (this - alone) for dense, this, alone in blocks])
    )
