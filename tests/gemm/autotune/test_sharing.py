"""One tuning for many: threads of a process, and ranks that take over a state."""

import json
import threading
import time
from dataclasses import replace

import pytest
import torch

from semisparse.errors import ConfigError
from semisparse.gemm import problem as problems
from semisparse.gemm.autotune.autotuner import DEFAULT
from tests.gemm.tuning import call

BF16 = torch.bfloat16


def test_one_thread_tunes_and_the_others_wait_for_its_result(make_tuner, timed):
    class Slow(timed):
        def fault(self, algorithm):
            time.sleep(0.02)
            return super().fault(algorithm)

    tuner, _, _ = make_tuner(make_candidates=Slow, seconds=5.0)
    results, barrier = [], threading.Barrier(6)

    def work():
        barrier.wait()
        results.append(call(tuner))

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Slow.made == 1
    assert len({id(choice) for choice in results}) == 1 and len(results) == 6


def test_a_thread_that_fails_lets_the_next_one_tune(make_tuner, timed):
    class Failing(timed):
        def fault(self, algorithm):
            if type(self).made == 1:
                raise RuntimeError("illegal memory access")
            return super().fault(algorithm)

    tuner, _, _ = make_tuner(make_candidates=Failing)
    with pytest.raises(RuntimeError, match="illegal"):
        call(tuner)
    assert tuner._engine.plan_count(-1) == 0
    assert call(tuner).algorithm == 4


def test_ranks_share_the_choices_of_one(make_tuner, timed):
    first, _, _ = make_tuner(stored=False)
    other = problems.activation_weight(24, 32, 48, BF16)
    mine = [call(first), call(first, other)]
    sent = json.loads(json.dumps(first.state()))
    second, library, _ = make_tuner(stored=False)
    assert second.load_state(sent) == 2
    assert [call(second), call(second, other)] == [replace(choice, source="shared") for choice in mine]
    assert timed.made == 2
    assert library.products == []
    assert json.loads(json.dumps(second.state())) == sent


def test_a_shared_choice_replaces_ones_own(make_tuner, timed):
    first, _, _ = make_tuner(stored=False)
    call(first)
    timed.dense_us = 1.0
    second, _, _ = make_tuner(stored=False)
    assert call(second).algorithm is None
    second.load_state(first.state())
    assert call(second).algorithm == 4


def test_a_state_of_another_gpu_is_not_used(make_tuner, timed):
    first, _, runtime = make_tuner(stored=False)
    identity = runtime.identity(-1)
    runtime.identity = lambda index: identity | {"gpu": "Another"}
    call(first)
    second, _, _ = make_tuner(stored=False)
    second.load_state(first.state())
    assert call(second).source == "tuned"


@pytest.mark.parametrize(
    "state",
    [
        {},
        None,
        {"schema": 2, "choices": []},
        {"schema": 1, "choices": [{"key": {}}]},
        {"schema": 1, "choices": [{"key": {"gpu": "x"}, "choice": {"algorithm": -1}}]},
        {"schema": 1, "choices": 5},
        {"schema": True, "choices": []},
        {"schema": 1, "choices": [{"key": {"gpu": 10**5000}, "choice": DEFAULT.to_record()}]},
        {"schema": 1, "choices": [{"key": {}, "choice": DEFAULT.to_record() | {"sparse_us": 10**400}}]},
        {"schema": 1, "choices": [{"key": {"gpu": float("nan")}, "choice": DEFAULT.to_record()}]},
    ],
)
def test_a_damaged_state_is_refused_whole(make_tuner, state):
    tuner, _, _ = make_tuner()
    good = {"key": {"gpu": "x"}, "choice": DEFAULT.to_record()}
    if isinstance(state, dict) and isinstance(state.get("choices"), list):
        state["choices"].insert(0, good)
    with pytest.raises(ConfigError, match=r"make it with tuning\.state"):
        tuner.load_state(state)
    assert list(tuner.choices()) == []


def test_what_the_native_library_has_prepared_by_earlier_choices_is_forgotten(make_tuner, monkeypatch):
    forgotten = []
    monkeypatch.setattr("semisparse.native.forget_products", lambda: forgotten.append(True))
    first, _, _ = make_tuner(stored=False)
    call(first)
    assert not forgotten
    make_tuner(stored=False)[0].load_state(first.state())
    assert forgotten == [True]
