"""The judge of a plan: the fastest choice in the whole step, by trial or by prediction, and why layers stay dense."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from semisparse.config import SparseConfig
from semisparse.errors import SemiSparseError
from semisparse.gemm.autotune.algorithm import one_line
from semisparse.planning.candidates import DENSE
from semisparse.planning.choosing import MARGIN, Choice, Measured, predicted, ranked
from semisparse.planning.contents import PlanRow
from semisparse.planning.measuring import Measurer
from semisparse.planning.timing import Times
from semisparse.planning.trial import MARGIN as TRIAL_MARGIN
from semisparse.planning.trial import Trial

_TRIED = 3
"""Choices that are tried in the whole step: each takes about five seconds."""
STEP_MARGIN = 0.04
"""Share of the step that a plan must be predicted to save if it is not tried in it. Half of it is how far predictions
err, the rest what dense products lose at the power limit once a process runs sparse ones (docs/speed.md)."""
_NO_MEMORY = "but the whole step ran out of memory"
_NEAR = 1.1
"""Those are tried whose predicted step is at most this much of the dense one's: host times are known about so well."""


class Decision(NamedTuple):
    """A choice, times of the dense step, and milliseconds of the planned one: expected, and by the layers alone."""

    choice: Choice
    step: Times | None = None
    expected: float | None = None
    by_layers: float | None = None
    remarks: tuple[str, ...] = ()


def decided(layers: Sequence[Measured], measurer: Measurer, step: Times | None, trial: Trial | None) -> Decision:
    """The best choice, by trial if there is one; dense where the step as a whole gains too little.

    Args:
        layers: Measured, in the model's order.
        measurer: What measured them.
        step: Of the dense step, if known.
        trial: Tries choices in the step, if it can be done.
    """
    choices = ranked(layers, measurer.candidates, measurer.mode, step)
    if step is None:
        return Decision(choices[0])
    by_layers = predicted(layers, choices[0], step)
    untried = Decision(choices[0], step, by_layers, by_layers)
    if trial is None:
        return _worth_it(untried)
    near = _near(choices, layers, step)
    if not near:
        return untried
    try:
        choice, base, expected, told = _fastest(near, layers, measurer, trial, step.ms)
    except (SemiSparseError, torch.OutOfMemoryError) as error:
        found = _worth_it(untried)
        if isinstance(error, torch.OutOfMemoryError):
            found = untried._replace(choice=_all_dense(choices[0], _NO_MEMORY), expected=step.ms)
        told = f"No choice could be tried in the whole step: {one_line(error)}"
        return found._replace(remarks=(*found.remarks, told))
    step = replace(step, ms=base, host_ms=None if step.host_ms is None else min(base, step.host_ms))
    return Decision(choice, step, expected, predicted(layers, choice, step), (told,))


def _worth_it(untried: Decision) -> Decision:
    """A choice that was not tried in the step, where it is predicted to gain enough of it; else all dense."""
    choice, step, expected = untried.choice, untried.step, untried.expected
    assert step is not None and expected is not None
    if expected <= 0:
        told = (
            f"A step of {step.ms:.4g} ms cannot be this model's, as its layers would save {step.ms - expected:.4g} ms. "
            "Nothing is predicted: give step the milliseconds of a whole dense step, or a callable that runs one."
        )
        return Decision(choice, remarks=(told,))
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
    better: Sequence[Choice], layers: Sequence[Measured], measurer: Measurer, trial: Trial, before: float
) -> tuple[Choice, float, float, str]:
    """Try choices: the fastest, the milliseconds of the dense step and of its own, and what was found.

    The dense step took `before` milliseconds when the plan began, in most processes without anything sparse yet.
    """
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
    told = f"Tried in the whole step: {base:.2f} ms dense ({before:.2f} ms when the plan began), {listed}."
    faster = [index for index, one in enumerate(found) if one.pays]
    # Dense steps beside sparse ones are slower at the power limit than those without (docs/speed.md).
    pay = [index for index in faster if found[index].ms < (1 - TRIAL_MARGIN) * before]
    if not pay:
        ran = any(one.ratio for one in found)
        instead = "but the whole step was not faster" + (" than when the plan began" if faster else "")
        return _all_dense(better[0], instead if ran else _NO_MEMORY), base, base, told
    best = min(pay, key=lambda index: found[index].ms)
    return better[best], base, found[best].ms, told


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _all_dense(other: Choice, instead: str) -> Choice:
    count = len(other.names)
    return Choice((DENSE,) * count, (None,) * count, other.host_weight, instead)


def rows_of(layers: Sequence[Measured], choice: Choice, candidates: Mapping[str, SparseConfig]) -> tuple[PlanRow, ...]:
    """What a plan says of each layer.

    Args:
        layers: Measured, in the model's order.
        choice: For these layers.
        candidates: Settings by name.
    """
    return tuple(_row(index, layers, choice, candidates) for index in range(len(layers)))


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
