"""Tuning all products of a model at once: found by one forward, measured on operands of their own.

Ranks first share what they know. What is still missing is divided among the ranks that miss it, each measures its part,
and they share again, so that all use the same choices. A rank that fails says so before the others would wait for it.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from semisparse import ops
from semisparse.errors import EngineError
from semisparse.gemm.autotune.algorithm import Choice, one_line
from semisparse.gemm.autotune.autotuner import VARIABLE, Asked, autotuner
from semisparse.gemm.autotune.candidates import keep_two_of_four
from semisparse.gemm.engine import engine
from semisparse.gemm.weight_gradient import WeightGradient
from semisparse.ops.products import multiply
from semisparse.planning.ranks import Ranks, divided
from semisparse.planning.tuned import Outcome, TunedProblem, TuningReport
from semisparse.planning.wanted import Wanted, wanted_by
from semisparse.stopwatch import Stopwatch

_AT_ONCE = 2**24
"""Entries of a random operand that are pruned at a time."""


def tuned(
    model: nn.Module,
    inputs: tuple[Any, ...],
    keywords: Mapping[str, Any],
    seconds: float | None,
    progress: Callable[[str], None],
    ranks: Ranks,
    clock: Callable[[], float] = time.monotonic,
) -> TuningReport:
    """As semisparse.tuning.tune, with the ranks that work together."""
    elapsed, tuner = Stopwatch(clock), autotuner()

    def look() -> tuple[dict[str, Wanted], dict[str, str], dict[str, Choice]]:
        wanted, without = wanted_by(model, inputs, keywords)
        return wanted, without, _known(wanted)

    looked = _attempt(look)
    ranks.gathered(looked if isinstance(looked, Exception) else None)
    wanted, without, before = looked
    if ranks.active:
        ranks.share()
        before = _known(wanted)
    missing = {name: one.work for name, one in wanted.items() if name not in before}
    parts = divided(ranks.gathered(missing))
    reasons: dict[str, str] = {}

    def measure() -> None:
        mine = [name for name, rank in parts.items() if rank == ranks.rank]
        for number, name in enumerate(mine, 1):
            spent = elapsed()
            if tuner.off:
                reasons[name] = f"tuning is off, by {VARIABLE}=0 or torch.use_deterministic_algorithms"
            elif seconds is not None and spent > seconds:
                reasons[name] = f"the budget of {seconds} s was spent"
            else:
                progress(f"tuning {number} of {len(mine)}: {wanted[name].problem} ({spent:.0f} s spent)")
                reasons[name] = _measured(wanted[name])

    failed = _attempt(measure)
    for others in ranks.gathered(failed if isinstance(failed, Exception) else dict(reasons)):
        reasons |= others
    if ranks.active:
        ranks.share()
    rows = _rows(wanted, before, parts, reasons)
    return TuningReport(rows, without, elapsed())


def _known(wanted: Mapping[str, Wanted]) -> dict[str, Choice]:
    """By key, what needs no measurement."""
    tuner = autotuner()
    found = {name: tuner.find(one.problem, one.index) for name, one in wanted.items()}
    return {name: choice for name, choice in found.items() if choice is not None}


def _measured(one: Wanted) -> str:
    """Tune a problem on random operands. Returns why that was not possible, or ""."""
    try:
        measure(one.problem, one.device)
    except torch.OutOfMemoryError:
        return "out of memory"
    except EngineError as error:
        return one_line(error)
    return ""


def measure(asked: Asked, device: torch.device) -> None:
    """Compute what is asked once on random operands, which tunes it as a layer's first call does.

    Args:
        asked: A product, or a weight gradient that may be sampled.
        device: CUDA device.

    Raises:
        EngineError: A cannot be packed.
        torch.OutOfMemoryError: The operands do not fit.
    """
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype) -> Tensor:
        drawn = torch.float16 if dtype.itemsize == 1 else dtype
        return torch.randn(shape, device=device, dtype=drawn, generator=generator).to(dtype)

    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        if isinstance(asked, WeightGradient):
            _, x8t, scale = ops.quantise(normal(asked.tokens, asked.in_features, dtype=asked.dtype), False, True)
            dy = normal(asked.tokens, asked.out_features, dtype=asked.dtype)
            bias_dtype = asked.out_dtype if asked.bias else None
            ops.fp8_sampled_grad_weight(dy, x8t, scale, None, True, bias_dtype, "auto", asked.out_dtype)
            return
        a = normal(asked.rows, asked.reduction, dtype=asked.dtype)
        keep_two_of_four(a, generator, _AT_ONCE)
        packed = engine().compress(a, check=False)
        del a
        out = torch.empty(asked.d_shape, dtype=asked.out_dtype, device=device)
        bias = normal(asked.rows, dtype=asked.dtype) if asked.bias else None
        multiply(asked, packed, normal(*asked.b_shape, dtype=asked.dtype), out, bias, "auto")


def _rows(
    wanted: Mapping[str, Wanted],
    before: Mapping[str, Choice],
    parts: Mapping[str, int],
    reasons: Mapping[str, str],
) -> tuple[TunedProblem, ...]:
    after = _known(wanted)
    rows = []
    for name, one in wanted.items():
        choice, outcome, why = after.get(name), _outcome(name, before, parts), reasons.get(name, "")
        if choice is None or choice.source == "default":
            outcome, why = "left out", why or (choice.note if choice is not None else "") or "it was not measured"
            choice = None
        rows.append(TunedProblem(str(one.problem), tuple(one.products), outcome, choice, why or _note(choice)))
    return tuple(rows)


def _outcome(name: str, before: Mapping[str, Choice], parts: Mapping[str, int]) -> Outcome:
    if name in before:
        return "shipped" if before[name].source == "shipped" else "cached"
    return "tuned" if name in parts else "left out"


def _note(choice: Choice | None) -> str:
    return "" if choice is None else choice.note


def _attempt(work: Callable[[], Any]) -> Any:
    """What work returns, or the exception that it raises."""
    try:
        return work()
    except Exception as error:
        return error
