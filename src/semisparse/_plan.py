"""semisparse.plan: which linear layers of a model gain from what, measured on this GPU."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from semisparse.arguments import check_budget, check_choice, check_progress
from semisparse.config import SparseConfig
from semisparse.errors import ConfigError, PlanError
from semisparse.planning import collect
from semisparse.planning.candidates import as_candidates
from semisparse.planning.choosing import summed
from semisparse.planning.deciding import decided, rows_of
from semisparse.planning.measuring import Measurer, distinct, logger
from semisparse.planning.packing import Packing
from semisparse.planning.problems import LayerUse
from semisparse.planning.result import Plan
from semisparse.planning.store import PlanStore, machine
from semisparse.planning.timing import Mode, Times, step_times
from semisparse.planning.trial import Trial, tried
from semisparse.schedule.step_packing import Pack
from semisparse.surgery.selection import Selector

__all__ = ["Plan", "plan"]


def plan(
    model: nn.Module,
    *inputs: Any,
    mode: Mode = "eager",
    pack: Pack = "each_forward",
    accumulation: int = 1,
    candidates: Iterable[str] | Mapping[str, SparseConfig] | None = None,
    tokens: collect.Tokens | None = None,
    select: Selector | Iterable[Selector] | None = None,
    exclude: Selector | Iterable[Selector] | None = None,
    step: Callable[[], object] | float | None = None,
    seconds: float | None = None,
    device: torch.device | str | None = None,
    progress: Callable[[str], None] = logger.info,
    cache: bool | Path = True,
    **keywords: Any,
) -> Plan:
    """Measure which linear layers of model gain from which settings, forward and backward, on this GPU.

    One forward finds the layers' problems: tokens, sizes, dtypes, needed gradients. Each distinct problem is then timed
    once, on layers of its own, all candidates interleaved, with pruning, packing, casts and host time. The model stays
    as it is; on meta, the inputs are, too. What activation checkpointing recomputes is not counted.

    Args:
        model: A dense model. Call plan as you train: in the same autocast, in train mode.
        *inputs: Of one forward, at the size of a micro-batch: of a training step, unless it accumulates.
        mode: How you train: "eager", "graph" (a captured step) or "compiled" (timed between pointwise functions).
        pack: When you pack, as SparseSchedule's: "each_forward", or "per_step", all weights together.
        accumulation: Micro-batches per optimizer step; times are those of a step.
        candidates: Names of "dense fp8", "2:4", "2:4 + mvue", "fp8 + 2:4" and "fp8 + 2:4 + mvue" (default: all there
            are), or settings by names of your own. Accuracy is not measured here.
        tokens: Instead of inputs: M of all layers, or by name or glob, or {M: calls}. Layers not named stay dense.
        select: As sparsify's. Default: every linear layer except heads, patch embeddings and adapters.
        exclude: As sparsify's.
        step: The whole dense step, to predict the planned one: its milliseconds, or a callable without arguments, which
            is run and timed, host included; it trains. In mode "eager" the best choices are tried in it, swapped into
            model and out again, and only what makes the step faster is planned.
        seconds: Budget for measuring layers. What is not reached stays dense and says so. Default: no limit.
        device: CUDA device to measure on. Default: the model's, or the current one.
        progress: Gets a line of text per problem; print, for example.
        cache: Whether times are kept in $XDG_CACHE_HOME/semisparse/plans (or ~/.cache) and read there; or a folder.
        **keywords: Of the forward. Names that are arguments of plan itself cannot be passed on.

    Returns:
        The plan; apply it with plan.apply(model) or sparsify(model, plan.configs).

    Raises:
        PlanError: There is no CUDA GPU.
        NoLayerMatchedError: The model has no nn.Linear, or a selector or name matches none.
        ConfigError: An argument is not among its choices, or the model has parameters without sizes (lazy ones).
        Exception: Whatever the model's forward, step or progress raises. Hooks are gone then, and the model is dense.
    """
    check_choice("mode", mode, Mode)
    settings, packing = as_candidates(candidates), Packing(pack, accumulation)
    check_budget(seconds)
    check_progress(progress)
    uses = uses_of(model, inputs, keywords, tokens, select, exclude)
    where = _where(model, device)
    with torch.cuda.device(where):
        return _in_step(model, step, uses, Measurer(settings, mode, where, _store(cache), seconds, progress, packing))


def _in_step(
    model: nn.Module, step: Callable[[], object] | float | None, uses: Sequence[LayerUse], measurer: Measurer
) -> Plan:
    """Time the step, if it can be run, and plan; in mode "eager" with a trial of the best choices."""
    if not callable(step):
        return planned(uses, measurer, _given(step))
    measurer.progress("timing the dense step")
    dense = step_times(step)
    trial = partial(tried, model, step, pack=measurer.packing.pack) if measurer.mode == "eager" else None
    return planned(uses, measurer, dense, trial)


def _store(cache: bool | Path) -> PlanStore | None:
    if isinstance(cache, bool):
        return PlanStore() if cache else None
    if not isinstance(cache, str | Path):
        raise ConfigError(f"cache={cache!r} must be True, False or the path of a folder")
    return PlanStore(Path(cache))


def uses_of(
    model: nn.Module,
    inputs: tuple[Any, ...],
    keywords: Mapping[str, Any],
    tokens: collect.Tokens | None,
    select: Selector | Iterable[Selector] | None = None,
    exclude: Selector | Iterable[Selector] | None = None,
) -> tuple[LayerUse, ...]:
    """The layers' calls, by a forward or by hand; arguments as plan's.

    Raises:
        ConfigError: There are both inputs and tokens, or neither where the model needs them.
    """
    if tokens is not None:
        if inputs or keywords:
            raise ConfigError("tokens is given, and inputs as well: leave one of them out")
        return collect.from_tokens(model, tokens, select, exclude)
    return collect.from_forward(model, inputs, keywords, select, exclude)


def planned(
    uses: Sequence[LayerUse], measurer: Measurer, step: Times | None = None, trial: Trial | None = None
) -> Plan:
    """Measure what layers ask for, and choose.

    Args:
        uses: Of a model, or made by hand.
        measurer: How to measure.
        step: Of the dense step, if known.
        trial: Tries choices in the step, if it can be done.
    """
    kind = measurer.device.type
    forked = torch.random.fork_rng([measurer.device] if kind == "cuda" else [])
    with forked, torch.autocast(kind, enabled=False), torch.inference_mode(False):
        found = measurer.measure(distinct(uses))
    layers = [summed(use, found, measurer.packing.accumulation) for use in uses]
    best = decided(layers, measurer, step, trial)
    return Plan(
        rows_of(layers, best.choice, measurer.candidates),
        measurer.mode,
        dict(measurer.candidates),
        machine(measurer.device),
        best.step,
        best.expected,
        best.choice.host_weight,
        best.remarks,
        best.by_layers,
        measurer.packing,
    )


def _where(model: nn.Module, device: torch.device | str | None) -> torch.device:
    if not torch.cuda.is_available():
        raise PlanError(
            "device: a plan is measured on a CUDA GPU, and there is none here; `semisparse plan` prints what was "
            "measured on other machines"
        )
    if device is None:
        on = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
        device = on.pop() if len(on) == 1 else torch.device("cuda")
    try:
        where = torch.device(device)
    except (RuntimeError, TypeError):
        raise ConfigError(f"device={device!r} is no device") from None
    if where.type != "cuda" or (where.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device={str(device)!r} is not a CUDA device of this machine")
    return where if where.index is not None else torch.device("cuda", torch.cuda.current_device())


def _given(step: Times | float | None) -> Times | None:
    if step is None or isinstance(step, Times):
        return step
    if type(step) not in (int, float) or not 0 < step < float("inf"):
        raise ConfigError(f"step={step!r} must be a callable that runs the dense step, or its milliseconds")
    return Times(float(step))
