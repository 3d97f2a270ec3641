"""semisparse.plan: which linear layers of a model gain from what, measured on this GPU."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from semisparse.arguments import check_budget, check_choice, check_progress
from semisparse.config import SparseConfig
from semisparse.errors import ConfigError, PlanError, SemiSparseError
from semisparse.gemm.autotune.algorithm import one_line
from semisparse.planning import collect
from semisparse.planning.candidates import DENSE, as_candidates
from semisparse.planning.choosing import MARGIN, Choice, Measured, predicted, ranked, summed
from semisparse.planning.contents import PlanRow
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

_TRIED = 3
"""Choices that are tried in the whole step: each takes about five seconds."""
STEP_MARGIN = 0.02
"""Share of the step that a plan must be predicted to save if it is not tried in it: predictions are about so exact."""
_NO_MEMORY = "but the whole step ran out of memory"
_NEAR = 1.1
"""Those are tried whose predicted step is at most this much of the dense one's: host times are known about so well."""


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
    choice, step, expected, by_layers, remarks = _decided(layers, measurer, step, trial)
    rows = tuple(_row(index, layers, choice, measurer.candidates) for index in range(len(layers)))
    facts = machine(measurer.device)
    return Plan(
        rows,
        measurer.mode,
        dict(measurer.candidates),
        facts,
        step,
        expected,
        choice.host_weight,
        remarks,
        by_layers,
        measurer.packing,
    )


class _Decision(NamedTuple):
    """A choice, times of the dense step, and milliseconds of the planned one: expected, and by the layers alone."""

    choice: Choice
    step: Times | None = None
    expected: float | None = None
    by_layers: float | None = None
    remarks: tuple[str, ...] = ()


def _decided(layers: Sequence[Measured], measurer: Measurer, step: Times | None, trial: Trial | None) -> _Decision:
    """The best choice, by trial if there is one; dense where the step as a whole gains too little."""
    choices = ranked(layers, measurer.candidates, measurer.mode, step)
    if step is None:
        return _Decision(choices[0])
    by_layers = predicted(layers, choices[0], step)
    untried = _Decision(choices[0], step, by_layers, by_layers)
    if trial is None:
        return _worth_it(untried)
    near = _near(choices, layers, step)
    if not near:
        return untried
    try:
        choice, base, expected, told = _fastest(near, layers, measurer, trial)
    except (SemiSparseError, torch.OutOfMemoryError) as error:
        decided = _worth_it(untried)
        if isinstance(error, torch.OutOfMemoryError):
            decided = untried._replace(choice=_all_dense(choices[0], _NO_MEMORY), expected=step.ms)
        told = f"No choice could be tried in the whole step: {one_line(error)}"
        return decided._replace(remarks=(*decided.remarks, told))
    step = replace(step, ms=base, host_ms=None if step.host_ms is None else min(base, step.host_ms))
    return _Decision(choice, step, expected, predicted(layers, choice, step), (told,))


def _worth_it(untried: _Decision) -> _Decision:
    """A choice that was not tried in the step, where it is predicted to gain enough of it; else all dense."""
    choice, step, expected = untried.choice, untried.step, untried.expected
    assert step is not None and expected is not None
    if expected <= 0:
        told = (
            f"A step of {step.ms:.4g} ms cannot be this model's, as its layers would save {step.ms - expected:.4g} ms. "
            "Nothing is predicted: give step the milliseconds of a whole dense step, or a callable that runs one."
        )
        return _Decision(choice, remarks=(told,))
    gain = 1 - expected / step.ms
    if gain >= STEP_MARGIN or set(choice.names) == {DENSE}:
        return untried
    instead = f"but the whole step would gain {gain:.1%}, which is within {STEP_MARGIN:.0%}"
    return untried._replace(choice=_all_dense(choice, instead), expected=step.ms)


def _near(choices: Sequence[Choice], layers: Sequence[Measured], step: Times) -> list[Choice]:
    """The best choices that swap a layer and may be faster than the dense step."""
    sparse = [choice for choice in choices if set(choice.names) != {DENSE}]
    return [choice for choice in sparse if predicted(layers, choice, step) <= _NEAR * step.ms][:_TRIED]


def _fastest(
    better: Sequence[Choice], layers: Sequence[Measured], measurer: Measurer, trial: Trial
) -> tuple[Choice, float, float, str]:
    """Try choices: the fastest, the milliseconds of the dense step and of its own, and what was found."""
    measurer.progress(f"trying {_count(len(better), 'choice')} in the whole step")
    variants = [
        {
            layer.use.name: measurer.candidates[name]
            for layer, name in zip(layers, choice.names, strict=True)
            if name != DENSE
        }
        for choice in better
    ]
    base, found = trial(variants)
    listed = ", ".join(
        f"{f'{one.ms:.2f} ms' if one.ratio else 'out of memory'} with {_count(len(configs), 'layer')} swapped"
        for one, configs in zip(found, variants, strict=True)
    )
    told = f"Tried in the whole step: {base:.2f} ms dense, {listed}."
    best = min((index for index, one in enumerate(found) if one.pays), key=lambda index: found[index].ms, default=None)
    if best is None:
        ran = any(one.ratio for one in found)
        instead = "but the whole step was not faster" if ran else _NO_MEMORY
        return _all_dense(better[0], instead), base, base, told
    return better[best], base, found[best].ms, told


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _all_dense(other: Choice, instead: str) -> Choice:
    count = len(other.names)
    return Choice((DENSE,) * count, (None,) * count, other.host_weight, instead)


def _row(index: int, layers: Sequence[Measured], choice: Choice, candidates: Mapping[str, SparseConfig]) -> PlanRow:
    layer, name = layers[index], choice.names[index]
    use = layer.use
    why = _why_dense(layer, choice) if name == DENSE else ""
    dropped = {} if use.stays else layer.dropped
    config = candidates.get(name)
    return PlanRow(use.name, use.in_features, use.out_features, use.calls, name, config, layer.times,
                   choice.casts[index], why, dropped)  # fmt: skip


def _why_dense(layer: Measured, choice: Choice) -> str:
    if layer.stays:
        return layer.stays
    weight = choice.host_weight
    others = {name: times for name, times in layer.times.items() if name != DENSE}
    if not others:
        return "no candidate could be measured"
    best = min(others, key=lambda name: others[name].ms if weight is None else others[name].on_device)
    dense = layer.times[DENSE]
    taken, whole = (one.ms if weight is None else one.on_device for one in (others[best], dense))
    if whole <= 0:  # of a compiled layer, where its neighbours alone took as long
        return "it takes too little time to be measured"
    ratio = taken / whole
    if ratio < 1 - MARGIN:
        instead = choice.instead or "but costs the host more than the step gains"
        where = "" if weight is None else " on the GPU"
        return f"{best} takes {ratio:.2f} of dense's time{where}, {instead}"
    if ratio < 1:
        return f"the fastest, {best}, takes {ratio:.3f} of dense's time, which is within {MARGIN:.0%}"
    return f"the fastest, {best}, takes {ratio:.2f} of dense's time"


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
