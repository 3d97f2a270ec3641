"""Part "model": a small stack of Llama-style MLPs of plain torch.nn, whole, dense and with each candidate."""

import gc
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semisparse.config import SparseConfig
from semisparse.gemm.autotune.algorithm import one_line
from semisparse.planning.building import compile_static, own_code
from semisparse.planning.candidates import DENSE, obstacle
from semisparse.planning.timing import Call, interleaved
from semisparse.selfcheck.contents import ModelTimes
from semisparse.selfcheck.operands import SEED
from semisparse.surgery.swap import sparsify

WIDTH, INNER, BLOCKS, TOKENS = 2048, 8192, 2, 16384
SMALL_MEMORY, FEWER_TOKENS = 15 * 2**30, 4096
"""A GPU with less memory than this gets fewer tokens."""

NEEDED = 10.0
"""Seconds of the budget that must be left to begin with another variant: about what compiling one takes."""

ORDER = ("2:4", "fp8 + 2:4", "fp8 + 2:4 + mvue", "2:4 + mvue", "dense fp8")
"""Of the candidates, while there is time."""

Timer = Callable[[Mapping[str, Call]], dict[str, float]]


class Block(nn.Module):
    """x + W_down(silu(W_gate n(x)) * W_up n(x)), with n the root-mean-square norm.

    Args:
        width: Features of x.
        inner: Features between.
    """

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.gate = nn.Linear(width, inner, bias=False)
        self.up = nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(M, width) to (M, width)."""
        y = self.norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def time_model(
    device: torch.device,
    candidates: Mapping[str, SparseConfig],
    left: Callable[[], float],
    progress: Callable[[str], None],
    *,
    sizes: tuple[int, int, int, int] | None = None,
    timer: Timer | None = None,
) -> ModelTimes:
    """Time forward and backward of the stack, dense and swapped, interleaved.

    Args:
        device: Where.
        candidates: Settings by name.
        left: Seconds that are left for this part; a candidate for which too little is left is dropped.
        progress: Told each variant's name.
        sizes: Width, inner features, blocks and tokens; default: those above.
        timer: Milliseconds of each call.
    """
    width, inner, blocks, tokens = sizes or (WIDTH, INNER, BLOCKS, _tokens(device))
    title = f"{blocks} Llama-style MLPs {width}/{inner}, {tokens} tokens, bf16, forward + backward"
    x = torch.randn(tokens, width, device=device, dtype=torch.bfloat16, requires_grad=True)
    dropped: dict[str, str] = {}
    progress(f"model: {DENSE}")
    dense = _stack(width, inner, blocks, device)
    calls, why_eager = _compiled_or_eager(dense, x)
    for name, config in sorted(candidates.items(), key=lambda one: (*ORDER, one[0]).index(one[0])):
        if why := obstacle(dense[0].gate, torch.bfloat16, config):  # type: ignore[arg-type]
            dropped[name] = why
            continue
        if left() < NEEDED:
            dropped[name] = "not timed: the budget was spent"
            continue
        progress(f"model: {name}")
        try:
            calls[name] = _variant(config, (width, inner, blocks), x, not why_eager)
        except Exception as error:  # one variant is left out, with its reason
            dropped[name] = one_line(error)
    progress("model: timing")
    ms = (timer or interleaved)(calls)
    calls.clear()
    gc.collect()
    return ModelTimes(title, "eager" if why_eager else "compiled", why_eager, ms, dropped)


def _stack(width: int, inner: int, blocks: int, device: torch.device) -> nn.Sequential:
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        return nn.Sequential(*(Block(width, inner) for _ in range(blocks))).to(device, torch.bfloat16)


def _compiled_or_eager(dense: nn.Sequential, x: Tensor) -> tuple[dict[str, Call], str]:
    """The dense call, compiled where that works, and why it is not."""
    try:
        call = _call(dense, x, compiled=True)
        call()
        return {DENSE: call}, ""
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # no compiler, no Triton, another Python: all kinds of errors
        why = one_line(error)
    call = _call(dense, x, compiled=False)
    call()
    return {DENSE: call}, why


def _variant(config: SparseConfig, sizes: tuple[int, int, int], x: Tensor, compiled: bool) -> Call:
    model = _stack(*sizes, x.device)
    report = sparsify(model, config)
    for name in report.swapped if config.grad_output is not None else ():
        layer = model.get_submodule(name)
        layer.held_seed = torch.tensor(SEED, device=x.device)  # as a schedule sets it
    call = _call(model, x, compiled)
    call()
    return call


def _call(model: nn.Module, x: Tensor, compiled: bool) -> Call:
    forward = compile_static(own_code(lambda x: model(x))) if compiled else model
    tensors, dy = [x, *model.parameters()], torch.ones_like(x)

    def call() -> None:
        for tensor in tensors:
            tensor.grad = None
        torch.autograd.backward(forward(x), dy)  # type: ignore[arg-type]

    return call


def _tokens(device: torch.device) -> int:
    if device.type == "cuda" and torch.cuda.get_device_properties(device).total_memory < SMALL_MEMORY:
        return FEWER_TOKENS
    return TOKENS
