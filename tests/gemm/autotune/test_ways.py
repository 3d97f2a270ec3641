"""Whether a weight gradient is sampled: measured, kept and shared as other choices are, and said."""

import json
import logging
from collections import Counter
from dataclasses import replace

import pytest
import torch

from semisparse.errors import EngineError
from semisparse.gemm import dispatch
from semisparse.gemm.autotune.algorithm import Choice
from semisparse.gemm.autotune.ways import SAMPLED
from semisparse.gemm.weight_gradient import WeightGradient
from tests.gemm.tuning import call, shipped_entry

BF16 = torch.bfloat16
GRADIENT = WeightGradient(16384, 11008, 4096, BF16, torch.float32, bias=True)


class Both:
    """Two ways that take made-up times."""

    def __init__(self, runtime, sampled_us=10.0, whole_us=20.0):
        self.calls: Counter[str] = Counter()
        self.us = {"sampled": sampled_us, "whole": whole_us}
        runtime.time = self._time

    def _time(self, index, called, repeats, launches=1):
        called()
        return self.us[self.last]

    def run(self, name):
        self.calls[name] += 1
        self.last = name

    def choose(self, tuner, gradient=GRADIENT):
        return tuner.choose_way(gradient, -1, lambda: self.run("sampled"), lambda: self.run("whole"))


@pytest.mark.parametrize(("sampled_us", "algorithm"), [(10.0, 0), (20.0, None), (30.0, None)])
def test_the_faster_way_is_chosen_once_and_a_tie_is_not_sampled(make_tuner, sampled_us, algorithm, caplog):
    caplog.set_level(logging.INFO, "semisparse")
    tuner, _, runtime = make_tuner()
    both = Both(runtime, sampled_us)
    choice = both.choose(tuner)
    assert choice == Choice(algorithm, 0, sampled_us, 20.0, "tuned", decides="sampling")
    way = "dense fp8 instead of sampled" if algorithm is None else "sampled"
    said = f"{way} ({sampled_us:.1f} us sampled, 20.0 us dense, tuned)"
    assert str(choice) == said
    begin, end = caplog.messages[-2:]
    assert begin == f"timing both ways to {GRADIENT}"
    assert end.startswith(f"chose for {GRADIENT} in ") and end.endswith(said)
    timed = both.calls.copy()
    assert timed.keys() == {"sampled", "whole"}
    assert both.choose(tuner) is choice is tuner.known(GRADIENT, -1)
    assert both.calls == timed


def test_it_is_measured_for_each_problem_and_shared_by_a_bucket(make_tuner):
    tuner, _, runtime = make_tuner()
    both = Both(runtime)
    both.choose(tuner)
    timed = both.calls["sampled"]
    both.choose(tuner, replace(GRADIENT, tokens=16383))
    assert both.calls["sampled"] == timed
    changes = {"tokens": 8192, "out_features": 32, "in_features": 32, "dtype": torch.float16, "out_dtype": BF16}
    for number, change in enumerate([*({name: value} for name, value in changes.items()), {"bias": False}], 2):
        both.choose(tuner, replace(GRADIENT, **change))
        assert both.calls["sampled"] == number * timed, change
        assert len(tuner.choices()) == number
    assert len({json.dumps(key) for key, _ in tuner.choices()}) == 7


def test_a_second_process_and_another_rank_decide_the_same_without_measuring(make_tuner):
    first, _, runtime = make_tuner()
    mine = Both(runtime, sampled_us=30.0).choose(first)
    second, _, runtime = make_tuner()
    other = Both(runtime)
    assert other.choose(second) == replace(mine, source="disk")
    third, _, runtime = make_tuner(stored=False)
    there = Both(runtime)
    assert there.choose(third).algorithm == 0  # its own measurement, which what is shared replaces
    measured = there.calls.copy()
    third.load_state(json.loads(json.dumps(first.state())))
    assert there.choose(third) == replace(mine, source="shared")
    assert not other.calls and there.calls == measured


def shipped_way(algorithm, **change):
    key = {"gpu": "Simulated", "cusparselt": 800, **GRADIENT.key(), **change}
    return key, Choice(algorithm, 0, None, None, "shipped", decides="sampling")


def test_without_tuning_it_samples_unless_it_is_known_to_be_slower(make_tuner, monkeypatch):
    monkeypatch.setenv("SEMISPARSE_TUNE", "0")
    tuner, _, runtime = make_tuner()
    both = Both(runtime)
    assert both.choose(tuner) is SAMPLED
    entries = [shipped_entry(), shipped_way(0, out_features=32), shipped_way(None, tokens=2 * GRADIENT.tokens)]
    assert both.choose(make_tuner(shipped=entries)[0]).algorithm is None
    assert call(make_tuner(shipped=entries)[0]).algorithm == 2
    assert not both.calls and tuner.state()["choices"] == []
    monkeypatch.setenv("SEMISPARSE_TUNE", "1")
    assert both.choose(tuner).source == "tuned"


def test_nothing_is_measured_in_a_capture(make_tuner):
    tuner, _, runtime = make_tuner()
    both = Both(runtime)
    runtime.is_capturing = True
    with pytest.raises(EngineError, match=r"chosen yet for dW \(11008x4096.*run one warm-up step"):
        both.choose(tuner)
    shipping, _, capturing = make_tuner(shipped=[shipped_way(None)])
    capturing.is_capturing = True
    assert both.choose(shipping).source == "shipped"
    assert not both.calls
    runtime.is_capturing = False
    warm = both.choose(tuner)
    runtime.is_capturing = True
    assert both.choose(tuner) is warm


def test_without_the_engine_nothing_is_sampled_and_the_reason_is_kept(make_tuner):
    tuner, _, runtime = make_tuner()
    runtime.trouble = "too old"
    both = Both(runtime)
    choice = both.choose(tuner)
    assert (choice.algorithm, choice.source, both.calls) == (None, "default", {})
    assert "too old" in choice.note
    assert "dense fp8 instead of sampled" in str(choice)


@pytest.mark.parametrize("failing", ["sampled", "whole"])
@pytest.mark.parametrize("error", [EngineError, torch.OutOfMemoryError])
def test_of_two_ways_the_one_that_fails_is_not_taken(make_tuner, failing, error):
    tuner, _, runtime = make_tuner()

    class Failing(Both):
        def run(self, name):
            super().run(name)
            if name == failing:
                raise error("it failed")

    both = Failing(runtime)
    choice = both.choose(tuner)
    assert choice.algorithm == (None if failing == "sampled" else 0)
    noted = failing == "whole" or error is torch.OutOfMemoryError
    name = "the dense fp8 dW" if failing == "whole" else "the sampled dW"
    assert choice.note.startswith(f"{name} could not be timed: {error.__name__}: it failed") is noted
    again, _, runtime = make_tuner()
    assert (Both(runtime).choose(again).source == "tuned") is noted  # what was disturbed is not stored


def test_products_are_tuned_inside(make_tuner, timed):
    tuner, _, runtime = make_tuner()
    both = Both(runtime)
    choice = tuner.choose_way(GRADIENT, -1, lambda: (call(tuner), both.run("sampled")), lambda: both.run("whole"))
    assert (choice.algorithm, timed.made, len(tuner.choices())) == (0, 1, 2)


def test_a_choice_of_the_other_kind_is_ignored(make_tuner, caplog):
    tuner, _, runtime = make_tuner()
    both = Both(runtime)
    way, product = both.choose(tuner), call(tuner)
    (way_key, _), (product_key, _) = tuner.choices()
    other, _, runtime = make_tuner(stored=False)
    swapped = [(way_key, product), (product_key, way)]
    other.load_state({
        "schema": 1, "choices": [{"key": key, "choice": choice.to_record()} for key, choice in swapped]
    })  # fmt: skip
    assert Both(runtime).choose(other).source == call(other).source == "tuned"
    assert caplog.text.count("decides") == 2


def test_observers_hear_what_ran_and_not_what_was_timed(make_tuner):
    tuner, _, runtime = make_tuner()
    both, told = Both(runtime, sampled_us=30.0), []

    def sampled():
        dispatch.tell(GRADIENT, 0, None)
        both.run("sampled")

    with dispatch.observed(lambda *what: told.append(what)):
        for _ in range(2):
            choice = dispatch.samples(GRADIENT, -1, sampled, lambda: both.run("whole"), tuner=tuner)
        assert told == [(GRADIENT, None, choice)] * 2
        both.us["whole"] = 40.0
        dispatch.samples(replace(GRADIENT, bias=False), -1, sampled, lambda: both.run("whole"), tuner=tuner)
    assert len(told) == 2
