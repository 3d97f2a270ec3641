"""What a plan predicts against what is measured: dense, the planned model, and the same with every layer swapped.

The plan is made first, on the dense model and its step. Then all variants run in one process, interleaved and
sustained; those with sparse products are compared with dense before any ran (fresh.py). The error of a plan is its
predicted step over the measured one, minus 1. Layers that the plan would not swap, and what swapping them costs, show
in the variants with every layer swapped.
"""

from collections.abc import Callable
from dataclasses import asdict
from time import perf_counter
from typing import Any

import torch
from torch import nn

import semisparse
from benchmarks.compare import advancing, forget_compiled
from benchmarks.end_to_end import seconds
from benchmarks.fresh import fresh_ms, ran_sparse
from benchmarks.launches import launches
from benchmarks.models import Card, Step
from benchmarks.planned_models import PLANNED
from benchmarks.table import Table
from benchmarks.timing import device, interleaved, peak_memory, ratio
from semisparse import Plan, tuning
from semisparse._plan import planned, uses_of
from semisparse.planning.candidates import as_candidates
from semisparse.planning.files import document
from semisparse.planning.measuring import Measurer, distinct
from semisparse.planning.timing import Times
from semisparse.surgery.layers import semi_sparse_layers

DENSE, PLAN = "dense", "planned"
EVERY = ("2:4", "fp8 + 2:4")
"""Candidates that every selected layer is swapped to, each in a variant of its own."""
_BLOCK_SECONDS, _EAGER_BLOCK_SECONDS, _EAGER_MORE = 1.0, 0.3, 3
"""Longer blocks than other benchmarks': whole steps heat the GPU. Eager ones are bounded by a host that may be slower
for a second at a time: shorter blocks, and so many times more rounds."""
Result = dict[str, Any]

NOTE = (
    "All variants in one process, interleaved and sustained. *error*: predicted / measured - 1. *dense / this* above 1 "
    "means faster than dense; *all NAME*: every layer swapped, whatever the plan says."
)


class _Caught(Exception):
    """Ends a forward whose inputs are known."""


def benchmark(name: str, rounds: int, toy: bool = False) -> Result:
    """Plan one model and time what was planned.

    Args:
        name: A key of PLANNED.
        rounds: Interleaved blocks per variant.
        toy: Run at toy size, on any device; the figures mean nothing.
    """
    card = PLANNED[name]
    forget_compiled()
    dense = card.build(toy)
    inputs, keywords = _inputs(card, dense, toy)
    calls: dict[str, Step] = {DENSE: card.step(card.compile(dense), dense, toy)}
    compile_seconds: dict[str, float] = {}  # the plan compiles the dense step, after its look at the model with hooks
    is_first = not ran_sparse()
    fresh = {} if card.compiled else fresh_ms({DENSE: calls[DENSE]})
    begin = perf_counter()
    plan = _plan(card, dense, inputs, keywords, calls[DENSE], toy)
    plan_seconds = perf_counter() - begin
    print(plan, flush=True)
    if card.compiled and is_first and plan.step:  # a step that is not tried in: as long as when the plan began
        fresh = {DENSE: plan.step.ms}
    sparse: set[str] = set()
    for variant, swap in _swaps(card, plan).items():
        model = card.build(toy)
        swap(model)
        if any(layer.sparse_config.prunes for layer in semi_sparse_layers(model).values()):
            sparse.add(variant)
        step = card.step(card.compile(model), model, toy)
        calls[variant] = advancing(step, model) if samples(model) else step
        compile_seconds[variant] = seconds(calls[variant])
    memory = {variant: peak_memory(call) for variant, call in calls.items()}
    host = host_loop_ms()
    if card.compiled:
        times = interleaved(calls, rounds=rounds, block_seconds=_BLOCK_SECONDS)
    else:
        times = interleaved(calls, rounds=_EAGER_MORE * rounds, block_seconds=_EAGER_BLOCK_SECONDS)
    assert plan.predicted_ms is not None and plan.step is not None
    ratios = {
        variant: ratio(times[DENSE], timing, fresh.get(DENSE) if variant in sparse else None)
        for variant, timing in times.items()
    }
    return {
        "card": name,
        "title": card.title,
        "label": card.label,
        "mode": plan.mode,
        "plan": document(plan),
        "printed": str(plan),
        "predicted_ms": plan.predicted_ms,
        "error": plan.predicted_ms / times[PLAN].median_ms - 1,
        # Where the plan was tried in the whole step, what the layers' times alone had said.
        "error_by_layers": None if plan.by_layers_ms is None else plan.by_layers_ms / times[PLAN].median_ms - 1,
        # The card's clock drifts between the plan and the blocks that are compared: the same in units of dense steps.
        "error_of_ratio": (plan.predicted_ms / plan.step.ms) / (times[PLAN].median_ms / times[DENSE].median_ms) - 1,
        "times_ms": {variant: timing.as_dict() for variant, timing in times.items()},
        "fresh_ms": fresh,
        "ratio_to_dense": {variant: one.median for variant, one in ratios.items()},
        "ratio_spread": {variant: asdict(one) for variant, one in ratios.items()},
        "peak_memory_bytes": memory,
        "host_loop_ms": [host, host_loop_ms()],
        "plan_seconds": plan_seconds,
        "compile_seconds": compile_seconds,
        "launches": launches(),
        "tuning": tuning.state(),
    }


def _swaps(card: Card, plan: Plan) -> dict[str, Callable[[nn.Module], object]]:
    """What makes each variant of a dense model."""
    swaps: dict[str, Callable[[nn.Module], object]] = {PLAN: plan.apply}
    for candidate in (one for one in EVERY if one in plan.candidates):
        config = plan.candidates[candidate]
        swaps[f"all {candidate}"] = lambda model, config=config: semisparse.sparsify(
            model, config, select=card.select, exclude=card.exclude
        )
    return swaps


def compile_parts(name: str, toy: bool = False, share: slice = slice(None)) -> None:
    """Run what a plan of this model compiles for timing, once, with made-up times.

    Args:
        name: A key of PLANNED.
        toy: Run at toy size, on any device.
        share: Of the problems, the largest first.
    """
    card = PLANNED[name]
    model = card.build(toy)
    uses = uses_of(model, *_inputs(card, model, toy), None, card.select, card.exclude)
    where = torch.device(device())
    Measurer(as_candidates(None), "compiled", where, timer=_toy_times).measure(distinct(uses)[share])


def table(results: list[Result]) -> Table:
    """A line per model and variant."""
    rows = []
    for result in results:
        for variant, timing in result["times_ms"].items():
            known = {DENSE: result["plan"]["step"]["ms"], PLAN: result["predicted_ms"]}.get(variant)
            measured = timing["median_ms"]
            predicted = ("", "") if known is None else (f"{known:.2f}", f"{100 * (known / measured - 1):+.1f} %")
            ratio_to_dense = f"{result['ratio_to_dense'][variant]:.3f}"
            rows.append((result["label"], variant, f"{measured:.2f}", *predicted, ratio_to_dense))
    return Table(("model", "variant", "ms", "predicted ms", "error", "dense / this"), tuple(rows), (NOTE,))


def host_loop_ms(count: int = 40) -> list[float]:
    """Milliseconds of one loop in Python each time that it runs: how steady the host is, whatever the GPU does.

    Args:
        count: Of runs, each some milliseconds.
    """
    found = []
    for _ in range(count):
        begin = perf_counter()
        for _ in range(200_000):
            pass
        found.append(1000 * (perf_counter() - begin))
    return found


def _inputs(card: Card, model: nn.Module, toy: bool) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a step of this card gives to the model: its forward is ended before anything is computed."""
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def catch(module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        seen.append((inputs, keywords))
        raise _Caught

    handle = model.register_forward_pre_hook(catch, with_kwargs=True)
    try:
        card.step(model, model, toy)()
    except _Caught:
        return seen[0]
    finally:
        handle.remove()
    raise RuntimeError(f"the step of {card.label} does not call its model")


def _plan(
    card: Card, model: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any], step: Step, toy: bool
) -> Plan:
    mode = "compiled" if card.compiled else "eager"
    if device() == "cuda":
        return semisparse.plan(
            model, *inputs, mode=mode, select=card.select, exclude=card.exclude, step=step, progress=print, **keywords
        )
    uses = uses_of(model, inputs, keywords, None, card.select, card.exclude)
    measurer = Measurer(
        as_candidates(None), mode, torch.device("cpu"), timer=_toy_times, compile=lambda function: function
    )
    return planned(uses, measurer, Times(seconds(step) * 1000))


def _toy_times(problem: object, calls: dict[str, Step], mode: object) -> dict[str, Times]:
    return {name: Times(max(seconds(call), 1e-6) * 1000) for name, call in calls.items()}


def samples(model: nn.Module) -> bool:
    """Whether a layer of model draws a sample, so that seeds have to advance."""
    return any(
        getattr(module, "sparse_config", None) and module.sparse_config.grad_output for module in model.modules()
    )
