"""Which candidate each layer gets: the fastest, where it gains more than measurements differ; else it stays dense.

Layers that read the same inputs round them to fp8 once, so they are chosen together. With the times of the whole step
known, the step is modelled as the longer of two sums: the device's time and the host's. Each layer adds its difference
to both. A step that the host bounds gains nothing from faster products, and loses by slower launches; so the choice
weighs both times, and the weights are those of the fastest predicted step.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from semisparse.config import SparseConfig
from semisparse.planning.candidates import DENSE
from semisparse.planning.problems import LayerUse, LinearProblem
from semisparse.planning.store import Measurement
from semisparse.planning.timing import Mode, Times, plus

MARGIN = 0.02
"""A candidate must save this share of the dense layer's time; repeated measurements differ by about 1 %."""

_WEIGHTS = [step / 20 for step in range(21)]
"""Of host time in the choice, where the step's times are known."""

Cost = Callable[[Times], float]


@dataclass(frozen=True)
class Measured:
    """A layer and what its candidates take per step, all calls together.

    Attributes:
        use: The layer.
        times: By candidate; empty if the layer stays dense anyway or could not be measured.
        cast: Of rounding its inputs to fp8; None where no candidate does.
        dropped: Candidate -> why it has no times.
    """

    use: LayerUse
    times: dict[str, Times] = field(default_factory=dict)
    cast: Times | None = None
    dropped: dict[str, str] = field(default_factory=dict)

    @property
    def stays(self) -> str:
        """Why the layer is dense without a choice; "" if there is one."""
        if self.use.stays or self.times:
            return self.use.stays
        return self.dropped.get(DENSE, "not measured")


def summed(use: LayerUse, found: Mapping[LinearProblem, Measurement], accumulation: int = 1) -> Measured:
    """The times of one layer per step, weighted by its calls; a candidate needs times for all of its problems.

    A weight that is packed per step is packed once, however often the layer is called.

    Args:
        use: The layer.
        found: Of all of its problems, unless it stays dense anyway.
        accumulation: Micro-batches per step, each with the layer's calls.
    """
    if use.stays:
        return Measured(use)
    parts = [(found[problem], calls) for problem, calls in use.calls]
    dropped = {name: why for part, _ in parts for name, why in part.dropped.items()}
    if DENSE in dropped:
        return Measured(use, dropped=dropped)
    names = [name for name in parts[0][0].times if all(name in part.times for part, _ in parts)]
    casts = [(part.cast, calls) for part, calls in parts]
    return Measured(
        use,
        {name: _with_packing(name, parts, accumulation) for name in names},
        _sum([(cast, calls) for cast, calls in casts if cast is not None], accumulation)
        if all(cast for cast, _ in casts)
        else None,
        dropped,
    )


def _with_packing(name: str, parts: Sequence[tuple[Measurement, float]], accumulation: int) -> Times:
    total = _sum([(part.times[name], calls) for part, calls in parts], accumulation)
    packs = [part.packs[name] for part, _ in parts if name in part.packs]
    return plus(total, max(packs, key=lambda times: times.ms)) if packs else total


def _sum(parts: Sequence[tuple[Times, float]], accumulation: int) -> Times:
    """All calls of a step; what one micro-batch holds is let go of before the next."""
    total = Times(0.0, 0.0, 0.0)
    for times, calls in parts:
        total = plus(total, times, calls)
    held = total.held_bytes
    return replace(plus(Times(0.0, 0.0, 0.0), total, accumulation), held_bytes=held)


@dataclass(frozen=True)
class Choice:
    """What was chosen for all layers.

    Attributes:
        names: Candidate of each layer, in their order.
        casts: Of the inputs that are rounded once for several layers, how much of each layer's time that saves.
        host_weight: Share of host time in the costs that were compared; None if the step's times are not known.
        instead: For choices that leave all dense though a layer gains: what the whole step says against it.
    """

    names: tuple[str, ...]
    casts: tuple[Times | None, ...]
    host_weight: float | None = None
    instead: str = ""


def ranked(
    layers: Sequence[Measured], candidates: Mapping[str, SparseConfig], mode: Mode, step: Times | None
) -> list[Choice]:
    """Choices for all layers, all of them different, the one with the fastest predicted step first.

    Args:
        layers: In the model's order.
        candidates: Settings by name.
        mode: How the step runs; a captured eager step shares no casts.
        step: Of the dense step, or None.

    Returns:
        One choice if the step's host time is not known. Else one or more, of which one leaves all layers dense.
    """
    groups = _groups(layers, shares=mode != "graph")
    if step is None or step.host_ms is None:
        return [_chosen(layers, groups, candidates, lambda times: times.ms, None)]
    weights = _WEIGHTS if mode != "graph" else [0.0]
    choices: dict[tuple[str, ...], Choice] = {}
    for weight in weights:

        def cost(times: Times, weight: float = weight) -> float:
            return (1 - weight) * times.on_device + weight * times.on_host

        choice = _chosen(layers, groups, candidates, cost, weight)
        choices.setdefault(choice.names, choice)
    dense = Choice((DENSE,) * len(layers), (None,) * len(layers), 0.0)
    choices.setdefault(dense.names, dense)
    return sorted(choices.values(), key=lambda choice: predicted(layers, choice, step))


def predicted(layers: Sequence[Measured], choice: Choice, step: Times) -> float:
    """Milliseconds of the step with a choice.

    Args:
        layers: As ranked()'s.
        choice: For these layers.
        step: Of the dense step.
    """
    change = difference(layers, choice)
    if step.host_ms is None:
        return step.ms + change.ms
    return max(step.on_device + change.on_device, step.on_host + change.on_host)


def difference(layers: Sequence[Measured], choice: Choice) -> Times:
    """What a choice adds to the dense step: negative times are saved."""
    total = Times(0.0, 0.0, 0.0)
    for layer, name, cast in zip(layers, choice.names, choice.casts, strict=True):
        if name != DENSE:
            total = plus(plus(total, _filled(layer.times[name])), _filled(layer.times[DENSE]), -1)
            total = total if cast is None else plus(total, _filled(cast), -1)
    return total


def _filled(times: Times) -> Times:
    return Times(times.ms, times.on_device, times.on_host, times.held_bytes)


def _groups(layers: Sequence[Measured], shares: bool) -> list[list[int]]:
    """Indices of layers, those with equal inputs together."""
    groups: dict[object, list[int]] = {}
    for index, layer in enumerate(layers):
        alone = not (shares and layer.use.reads and layer.cast is not None)
        groups.setdefault(index if alone else layer.use.reads, []).append(index)
    return list(groups.values())


def _chosen(
    layers: Sequence[Measured],
    groups: list[list[int]],
    candidates: Mapping[str, SparseConfig],
    cost: Cost,
    weight: float | None,
) -> Choice:
    names: list[str] = [DENSE] * len(layers)
    casts: list[Times | None] = [None] * len(layers)
    for group in groups:
        for index, name in zip(group, _of_group([layers[i] for i in group], candidates, cost), strict=True):
            names[index] = name
        in_fp8 = [index for index in group if names[index] != DENSE and candidates[names[index]].precision is not None]
        for index in in_fp8[1:]:
            casts[index] = layers[index].cast
    return Choice(tuple(names), tuple(casts), weight)


def _of_group(group: list[Measured], candidates: Mapping[str, SparseConfig], cost: Cost) -> list[str]:
    """The best names for layers that share their inputs: those k that gain most get fp8, for the best k."""
    plain = [_best(layer, candidates, cost, fp8=False) for layer in group]
    in_fp8 = [_best(layer, candidates, cost, fp8=True) for layer in group]
    # What fp8 must save beyond its cost: the margin, where the alternative is dense.
    least = [MARGIN * abs(cost(layer.times[DENSE])) if name == DENSE and layer.times else 0.0
             for layer, (name, _) in zip(group, plain, strict=True)]  # fmt: skip
    gains = {i: plain[i][1] - in_fp8[i][1] - least[i] for i in range(len(group)) if in_fp8[i][0]}
    order = sorted(gains, key=lambda i: -gains[i])
    best, taken, total = 0.0, 0, 0.0
    for count, index in enumerate(order, 1):
        cast = group[index].cast
        total += gains[index] + (cost(cast) if count > 1 and cast is not None else 0.0)
        if total > best:
            best, taken = total, count
    chosen = [name for name, _ in plain]
    for index in order[:taken]:
        chosen[index] = in_fp8[index][0]
    return chosen


def _best(layer: Measured, candidates: Mapping[str, SparseConfig], cost: Cost, *, fp8: bool) -> tuple[str, float]:
    """The cheapest candidate of one precision and its cost. Dense, in 16 bits, wins unless MARGIN is saved."""
    offered = {name: cost(times) for name, times in layer.times.items()
               if name != DENSE and (candidates[name].precision is not None) == fp8}  # fmt: skip
    dense = cost(layer.times[DENSE]) if DENSE in layer.times else 0.0
    # A difference of two times, as of compiled layers, may come out below zero.
    enough = dense - MARGIN * abs(dense)
    best = min(offered, key=lambda name: offered[name], default="")
    if fp8:
        return (best, offered[best]) if best else ("", 0.0)
    return (best, offered[best]) if best and offered[best] < enough else (DENSE, dense)
