"""The choice: brute force over all choices judges it where layers share inputs and where the host counts."""

from dataclasses import replace
from itertools import product
from typing import Any

import pytest

from semisparse.planning.candidates import DENSE, as_candidates, default_candidates
from semisparse.planning.choosing import MARGIN, Choice, Measured, difference, predicted, ranked, summed
from semisparse.planning.problems import LayerUse, LinearProblem
from semisparse.planning.store import Measurement
from semisparse.planning.timing import Times
from tests.planning.simulated import measurement

CANDIDATES = default_candidates()
SMALL, LARGE = LinearProblem(16, 32, 32), LinearProblem(16, 64, 64)


def choose(*given: Any) -> Choice:
    """The best choice."""
    return ranked(*given)[0]


def layer(shares: dict[str, float], reads: tuple[int, ...] = (), cast: float = 0.0, ms: float = 4.0) -> Measured:
    times = {name: Times(ms * share, ms * share, 0.0) for name, share in shares.items()}
    return Measured(LayerUse("x", 32, 32, ((SMALL, 1.0),), reads), times, Times(cast, cast, 0.0))


def test_calls_are_weighted() -> None:
    use = LayerUse("x", 32, 32, ((SMALL, 1.0), (LARGE, 3.0)))
    found = summed(use, {SMALL: measurement(SMALL), LARGE: measurement(LARGE)})
    assert found.times["2:4"].ms == 0.875 * (SMALL.tokens * 32 * 32 + 3 * LARGE.tokens * 64 * 64) / 2**12
    assert found.cast is not None and found.cast.ms == 4 * 0.125


def test_a_step_of_several_micro_batches_packs_once() -> None:
    use, pack = LayerUse("x", 32, 32, ((SMALL, 1.0), (LARGE, 3.0))), Times(8.0, 8.0, 0.5, 64)
    parts = {problem: replace(measurement(problem), packs={"2:4": pack}) for problem in (SMALL, LARGE)}
    parts[SMALL].times["2:4"] = replace(parts[SMALL].times["2:4"], held_bytes=10)
    once, four = summed(use, parts), summed(use, parts, 4)
    assert four.times["dense"].ms == 4 * once.times["dense"].ms
    assert four.times["2:4"].ms - 8.0 == 4 * (once.times["2:4"].ms - 8.0)
    assert four.times["2:4"].host_ms == once.times["2:4"].host_ms == 0.5
    assert four.times["2:4"].held_bytes == once.times["2:4"].held_bytes == 10 + 64, "a micro-batch at a time"
    assert four.cast is not None and once.cast is not None and four.cast.ms == 4 * once.cast.ms


def test_a_candidate_needs_times_for_every_problem() -> None:
    use = LayerUse("x", 32, 32, ((SMALL, 1.0), (LARGE, 1.0)))
    lacking = measurement(LARGE, {"dense": 1.0})
    lacking = Measurement(lacking.times, None, {"2:4": "out of memory"})
    found = summed(use, {SMALL: measurement(SMALL), LARGE: lacking})
    assert list(found.times) == ["dense"] and found.dropped == {"2:4": "out of memory"}
    lost = Measurement({}, dropped={DENSE: "out of memory"})
    assert summed(use, {SMALL: measurement(SMALL), LARGE: lost}).stays == "out of memory"


@pytest.mark.parametrize(
    ("shares", "chosen"),
    [
        ({"dense": 1.0, "2:4": 0.8, "fp8 + 2:4": 0.7}, "fp8 + 2:4"),
        ({"dense": 1.0, "2:4": 0.7, "fp8 + 2:4": 0.8}, "2:4"),
        ({"dense": 1.0, "2:4": 1.1, "dense fp8": 1.2}, DENSE),
        ({"dense": 1.0, "2:4": 1 - MARGIN / 2, "dense fp8": 1 - MARGIN / 2}, DENSE),
        ({"dense": 1.0}, DENSE),
    ],
)
def test_the_fastest_is_chosen_if_it_gains_more_than_the_margin(shares: dict[str, float], chosen: str) -> None:
    assert choose([layer(shares)], CANDIDATES, "eager", None).names == (chosen,)


def test_layers_that_stay_dense_are_left_alone() -> None:
    stays = Measured(LayerUse("x", 32, 32, (), stays="never called"))
    assert choose([stays, layer({"dense": 1.0, "2:4": 0.5})], CANDIDATES, "eager", None).names == (DENSE, "2:4")


SHARED = [
    layer({"dense": 1.0, "2:4": 0.75, "fp8 + 2:4": 0.78125}, (1,), 0.5),
    layer({"dense": 1.0, "2:4": 0.75, "dense fp8": 0.78125}, (1,), 0.5),
    layer({"dense": 1.0, "2:4": 0.75, "fp8 + 2:4": 1.0}, (1,), 0.5),
]


def test_layers_that_share_a_cast_are_chosen_together_as_brute_force_does() -> None:
    for count in (1, 2, 3):
        layers = SHARED[:count]

        def total(names: tuple[str, ...], layers: list[Measured] = layers) -> float:
            in_fp8 = sum(name != DENSE and CANDIDATES[name].precision is not None for name in names)
            return sum(one.times[name].ms for one, name in zip(layers, names, strict=True)) - 0.5 * max(0, in_fp8 - 1)

        best = min(total(names) for names in product(*(one.times for one in layers)))
        choice = choose(layers, CANDIDATES, "eager", None)
        assert total(choice.names) == best
        assert 4.0 * count + difference(layers, choice).ms == best
    assert choose(SHARED[:2], CANDIDATES, "eager", None).names == ("fp8 + 2:4", "dense fp8")
    assert choose(SHARED[:2], CANDIDATES, "graph", None).names == ("2:4", "2:4"), "captured eager code shares no casts"


def hosted(name: str, device: float, host: float) -> Measured:
    times = {DENSE: Times(4.0, 4.0, 1.0), name: Times(max(device, host), device, host)}
    return Measured(LayerUse("x", 32, 32, ((SMALL, 1.0),)), times)


@pytest.mark.parametrize("step", [Times(20.0, None, 4.0), Times(20.0, None, 18.0), Times(20.0, None, 20.0)])
def test_where_the_host_bounds_the_step_the_choice_weighs_it_as_brute_force_does(step: Times) -> None:
    layers = [hosted("2:4", 3.0, 1.5), hosted("2:4", 2.0, 4.0), hosted("2:4", 3.5, 1.0), hosted("2:4", 1.0, 1.25)]
    choice = choose(layers, CANDIDATES, "compiled", step)
    every = [Choice(names, (None,) * 4) for names in product(*(one.times for one in layers))]
    assert predicted(layers, choice, step) == min(predicted(layers, one, step) for one in every)
    assert predicted(layers, choice, step) <= step.ms


def test_a_step_whose_host_time_is_not_known_is_changed_by_the_layers_alone() -> None:
    layers = [layer({"dense": 1.0, "2:4": 0.75})]
    choice = choose(layers, CANDIDATES, "eager", Times(10.0))
    assert (predicted(layers, choice, Times(10.0)), choice.host_weight) == (9.0, None)


@pytest.mark.parametrize(("ms", "choice"), [(-0.99, "dense"), (-1.01, "dense"), (-1.03, "2:4")])
def test_a_difference_below_zero_needs_the_margin_too(ms: float, choice: str) -> None:
    """Of a small compiled layer, whose neighbours alone took longer."""
    small = Measured(LayerUse("", 32, 32, ((SMALL, 1.0),)), {"dense": Times(-1.0), "2:4": Times(ms)})
    assert choose([small], as_candidates(["2:4"]), "compiled", None).names == (choice,)
