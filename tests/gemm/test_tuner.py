"""Who tunes when, and where a choice comes from. test_race.py judges the race itself, test_trial.py the checks."""

import gc
import itertools
import json
import threading
import time
import weakref
from dataclasses import replace

import pytest
import torch

from semisparse.errors import ConfigError, EngineError
from semisparse.gemm import problem as problems
from semisparse.gemm import shipped
from semisparse.gemm.choice import Choice
from semisparse.gemm.trial import Operands, Trial
from semisparse.gemm.tuner import DEFAULT, Tuner, tuner
from semisparse.gemm.tuning_cache import TuningCache
from tests.gemm.simulated import SimulatedLibrary, make_engine, operands

BF16 = torch.bfloat16
FORWARD = problems.forward(24, 32, 48, BF16)


class Timed(Trial):
    """Real checks on the simulated library, made-up times: algorithm 4 is the fastest, dense takes `dense_us`."""

    made = 0
    dense_us = 50.0

    def __init__(self, *arguments):
        super().__init__(*arguments)
        type(self).made += 1

    def time(self, algorithm, repeats):
        return self.dense_us if algorithm is None else 10.0 + abs(algorithm - 4)


@pytest.fixture
def timed():
    return type("Timed", (Timed,), {})


@pytest.fixture
def make(tmp_path, timed):
    """Makes tuners that share a cache folder, as processes would."""

    def build(library=None, rows=(), cached=True, **options):
        engine, library, runtime = make_engine(library)
        cache = TuningCache(tmp_path / "semisparse") if cached else None
        options = {"make_trial": timed, "rows": lambda: shipped.parse(table(rows))} | options
        return Tuner(engine, cache, **options), library, runtime

    return build


def table(rows=()):
    return json.dumps({"schema": 1, "rows": list(rows)})


def call(tuner, problem=FORWARD, dense=True):
    a, b, out, bias = operands(problem)
    packed = tuner._engine.compress(a)
    return tuner.choose(problem, -1, Operands(packed, b, out, bias, (lambda: None) if dense else None))


def test_the_first_call_tunes_and_later_calls_do_not(make, timed):
    tuner, library, _ = make()
    choice = call(tuner)
    assert (choice.algorithm, choice.sparse_us, choice.dense_us, choice.source) == (4, 10.0, 50.0, "tuned")
    products = len(library.products)
    assert call(tuner) is choice
    assert tuner.known(FORWARD, -1) is choice
    assert (timed.made, len(library.products)) == (1, products)


def test_wrong_algorithms_are_quarantined_end_to_end(make):
    library = SimulatedLibrary()
    runs = itertools.count()
    library.faults[4] = lambda out: out[0].add_(1)
    library.faults[3] = lambda out: out[0].add_(next(runs) == 2)
    library.faults[5] = lambda out: (_ for _ in ()).throw(torch.OutOfMemoryError("out of memory"))
    tuner, _, _ = make(library)
    choice = call(tuner)
    assert choice.algorithm == 2
    assert {number: reason.partition(":")[0] for number, reason in choice.rejected} == {
        3: "wrong",
        4: "wrong",
        5: "OutOfMemoryError",
    }


def test_dense_is_chosen_where_it_is_faster(make, timed):
    timed.dense_us = 9.0
    choice = call(make()[0])
    assert (choice.algorithm, choice.sparse_algorithm) == (None, 4)
    assert call(make(cached=False)[0], dense=False).algorithm == 4


def test_token_counts_of_one_bucket_share_a_result_and_n_and_k_do_not(make, timed):
    tuner, _, _ = make()
    for tokens in range(1025, 1281):
        call(tuner, problems.grad_input(tokens, 32, 48, BF16))
    assert timed.made == 1
    call(tuner, problems.grad_input(1281, 32, 48, BF16))
    assert timed.made == 2
    call(tuner, problems.grad_input(1025, 32, 64, BF16))
    assert timed.made == 3


def test_plans_of_losers_are_freed(make):
    tuner, _, _ = make()
    call(tuner)
    assert tuner._engine.plan_count(-1) == 1


def test_a_second_process_takes_the_choice_from_disk(make, timed):
    first = call(make()[0])
    tuner, library, _ = make()
    second = call(tuner)
    assert second == replace(first, source="disk")
    assert timed.made == 1
    assert library.products == []


@pytest.mark.parametrize("name", ["gpu", "sm_count", "capability", "driver", "cuda", "torch", "triton"])
def test_a_choice_of_another_environment_is_not_used(make, timed, name):
    call(make()[0])
    tuner, _, runtime = make()
    identity = runtime.identity(-1)
    runtime.identity = lambda index: identity | {name: "another"}
    assert call(tuner).source == "tuned"
    assert timed.made == 2


def test_a_choice_of_another_library_version_is_not_used(make, timed):
    call(make(SimulatedLibrary(version=800))[0])
    assert call(make(SimulatedLibrary(version=801))[0]).source == "tuned"
    assert timed.made == 2


def test_a_stored_algorithm_that_the_library_has_not_is_ignored_with_a_warning(make, timed):
    tuner, _, _ = make()
    key = tuner.key(FORWARD, -1)
    tuner._cache.store(key, Choice(900, 900, 1.0, 2.0, "tuned"))
    with pytest.warns(UserWarning, match="an algorithm that 32x48"):
        assert call(tuner).algorithm == 4
    assert call(make()[0]).algorithm == 4


def test_a_damaged_cache_costs_one_warning_and_a_tuning_run(make, timed, tmp_path):
    call(make()[0])
    for path in (tmp_path / "semisparse").iterdir():
        path.write_text("{")
    with pytest.warns(RuntimeWarning, match="tuning cache"):
        assert call(make()[0]).source == "tuned"
    assert call(make()[0]).source == "disk"
    assert timed.made == 2


@pytest.mark.parametrize("fault", [torch.OutOfMemoryError("out of memory"), None])
def test_a_choice_that_was_disturbed_stays_in_this_process(make, timed, fault):
    library = SimulatedLibrary()
    if fault is not None:
        library.faults[0] = lambda out: (_ for _ in ()).throw(fault)
    call(make(library)[0])
    assert call(make()[0]).source == ("disk" if fault is None else "tuned")


def test_a_problem_the_library_refuses_goes_dense_with_a_note(make):
    tuner, library, _ = make()
    tuner._engine.available()
    packed = torch.zeros(1, dtype=torch.uint8)
    library.refuse["matmul"] = 10
    _, b, out, _ = operands(FORWARD)
    choice = tuner.choose(FORWARD, -1, Operands(packed, b, out, None, lambda: None))
    assert (choice.algorithm, choice.sparse_algorithm) == (None, None)
    assert "NOT_SUPPORTED" in choice.note


def test_the_users_error_in_an_operand_is_not_taken_for_a_bad_algorithm(make):
    tuner, _, _ = make()
    _, b, out, _ = operands(FORWARD)
    with pytest.raises(ValueError, match="packed has shape"):
        tuner.choose(FORWARD, -1, Operands(torch.zeros(8, dtype=torch.uint8), b, out))
    assert tuner.known(FORWARD, -1) is None
    assert call(tuner).algorithm == 4


@pytest.mark.parametrize("tune", ["0", "1"])
@pytest.mark.parametrize("capturing", [False, True])
def test_without_an_engine_the_choice_is_dense_whatever_the_mode(make, monkeypatch, tune, capturing):
    monkeypatch.setenv("SEMISPARSE_TUNE", tune)
    tuner, _, runtime = make(SimulatedLibrary(version=700))
    runtime.is_capturing = capturing
    _, b, out, _ = operands(FORWARD)
    choice = tuner.choose(FORWARD, -1, Operands(torch.zeros(8, dtype=torch.uint8), b, out))
    assert (choice.algorithm, choice.sparse_algorithm, choice.source) == (None, None, "default")
    assert "0.7.0 is older than 0.8.0" in choice.note
    assert tuner.known(FORWARD, -1) is choice
    assert tuner.state()["choices"] == []


def test_nothing_of_a_trial_outlives_the_tuning(make, timed):
    """Not even until the next garbage collection: it would hold device memory."""
    watched = []

    class Watched(timed):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            watched.extend([weakref.ref(self), weakref.ref(self._sample.b), weakref.ref(self._sample.expected[0])])

    library = SimulatedLibrary()
    library.faults[2] = lambda out: (_ for _ in ()).throw(torch.OutOfMemoryError("out of memory"))
    tuner, _, _ = make(library, make_trial=Watched)
    gc.collect()
    gc.disable()
    try:
        call(tuner)
        assert [reference() for reference in watched] == [None] * 3
    finally:
        gc.enable()


# ---- tuning switched off


@pytest.fixture
def no_tuning(request, monkeypatch):
    if request.param == "variable":
        monkeypatch.setenv("SEMISPARSE_TUNE", "0")
        yield
    else:
        torch.use_deterministic_algorithms(True)
        yield
        torch.use_deterministic_algorithms(False)


off = pytest.mark.parametrize("no_tuning", ["variable", "deterministic"], indirect=True)


def shipped_row(**change):
    return {
        "gpu": "Simulated", "cusparselt": 800, "dtype": "bfloat16", "b_order": "column", "d_order": "column",
        "token_axis": "columns", "bias": False, "rows": [17, 32], "reduction": [33, 64], "columns": [1, 64],
        "algorithm": 2, "sparse_algorithm": 2,
    } | change  # fmt: skip


@off
@pytest.mark.usefixtures("no_tuning")
def test_without_tuning_the_default_is_algorithm_0(make, timed):
    tuner, library, _ = make()
    assert call(tuner) == DEFAULT == Choice(0, 0, None, None, "default")
    assert call(tuner) is DEFAULT
    assert timed.made == 0
    assert library.products == []


@off
@pytest.mark.usefixtures("no_tuning")
def test_without_tuning_a_refused_problem_goes_dense(make):
    tuner, library, _ = make()
    tuner._engine.available()
    library.refuse["matmul"] = 10
    _, b, out, _ = operands(FORWARD)
    choice = tuner.choose(FORWARD, -1, Operands(torch.zeros(8, dtype=torch.uint8), b, out))
    assert (choice.algorithm, choice.source) == (None, "default")
    assert "NOT_SUPPORTED" in choice.note


@off
@pytest.mark.usefixtures("no_tuning")
def test_without_tuning_the_shipped_table_serves_before_the_default(make):
    choice = call(make(rows=[shipped_row()])[0])
    assert (choice.algorithm, choice.source) == (2, "shipped")
    assert call(make(rows=[shipped_row(gpu="Another")])[0]) is DEFAULT
    assert call(make(rows=[shipped_row(algorithm=77, sparse_algorithm=77)])[0]) is DEFAULT


def test_without_tuning_a_stored_choice_serves_before_both(make, monkeypatch):
    tuned = call(make()[0])
    monkeypatch.setenv("SEMISPARSE_TUNE", "0")
    assert call(make(rows=[shipped_row()])[0]) == replace(tuned, source="disk")


def test_the_variable_is_read_at_each_new_problem_and_a_default_is_not_kept(make, timed, monkeypatch):
    tuner, _, _ = make()
    monkeypatch.setenv("SEMISPARSE_TUNE", "0")
    assert call(tuner) is DEFAULT
    monkeypatch.setenv("SEMISPARSE_TUNE", "1")
    assert call(tuner).source == "tuned"
    monkeypatch.setenv("SEMISPARSE_TUNE", "0")
    assert call(tuner).source == "tuned"
    monkeypatch.setenv("SEMISPARSE_TUNE", "yes")
    with pytest.raises(ConfigError, match="SEMISPARSE_TUNE='yes'"):
        call(tuner, problems.grad_input(24, 32, 48, BF16))


def test_a_default_is_neither_written_nor_shared(make, monkeypatch):
    monkeypatch.setenv("SEMISPARSE_TUNE", "0")
    tuner, _, _ = make(rows=[shipped_row()])
    call(tuner)
    assert tuner.state()["choices"] == []
    assert not tuner._cache._folder.exists()


# ---- capture


def test_a_cold_capture_raises_and_names_the_way_out(make, timed):
    tuner, library, runtime = make()
    a, b, out, _ = operands(FORWARD)
    given = Operands(tuner._engine.compress(a), b, out)
    runtime.is_capturing = True
    with pytest.raises(EngineError, match="run one warm-up step outside the capture first"):
        tuner.choose(FORWARD, -1, given)
    assert (timed.made, library.products) == (0, [])
    runtime.is_capturing = False
    warm = tuner.choose(FORWARD, -1, given)
    runtime.is_capturing = True
    assert tuner.choose(FORWARD, -1, given) is warm


def test_a_cold_capture_uses_what_is_stored_or_shipped(make):
    tuner, _, runtime = make(rows=[shipped_row()])
    runtime.is_capturing = True
    assert call(tuner).source == "shipped"
    runtime.is_capturing = False
    assert call(tuner).source == "tuned"  # a shipped choice does not replace tuning
    tuner, _, runtime = make()
    runtime.is_capturing = True
    assert call(tuner).source == "disk"


@off
@pytest.mark.usefixtures("no_tuning")
def test_a_capture_without_tuning_uses_the_default(make):
    tuner, _, runtime = make()
    runtime.is_capturing = True
    assert call(tuner) is DEFAULT


# ---- threads and ranks


def test_one_thread_tunes_and_the_others_wait_for_its_result(make, timed):
    class Slow(timed):
        def fault(self, algorithm):
            time.sleep(0.02)
            return super().fault(algorithm)

    tuner, _, _ = make(make_trial=Slow, seconds=5.0)
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


def test_a_thread_that_fails_lets_the_next_one_tune(make, timed):
    class Failing(timed):
        def fault(self, algorithm):
            if type(self).made == 1:
                raise RuntimeError("illegal memory access")
            return super().fault(algorithm)

    tuner, _, _ = make(make_trial=Failing)
    with pytest.raises(RuntimeError, match="illegal"):
        call(tuner)
    assert tuner._engine.plan_count(-1) == 0
    assert call(tuner).algorithm == 4


def test_ranks_share_the_choices_of_one(make, timed):
    first, _, _ = make(cached=False)
    other = problems.activation_weight(24, 32, 48, BF16)
    mine = [call(first), call(first, other)]
    sent = json.loads(json.dumps(first.state()))
    second, library, _ = make(cached=False)
    assert second.load_state(sent) == 2
    assert [call(second), call(second, other)] == [replace(choice, source="shared") for choice in mine]
    assert timed.made == 2
    assert library.products == []
    assert json.loads(json.dumps(second.state())) == sent


def test_a_shared_choice_replaces_ones_own(make, timed):
    first, _, _ = make(cached=False)
    call(first)
    timed.dense_us = 1.0
    second, _, _ = make(cached=False)
    assert call(second).algorithm is None
    second.load_state(first.state())
    assert call(second).algorithm == 4


def test_a_state_of_another_gpu_is_not_used(make, timed):
    first, _, runtime = make(cached=False)
    identity = runtime.identity(-1)
    runtime.identity = lambda index: identity | {"gpu": "Another"}
    call(first)
    second, _, _ = make(cached=False)
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
        {"schema": 1, "choices": [{"key": {"gpu": float("nan")}, "choice": DEFAULT.to_record()}]},
    ],
)
def test_a_damaged_state_is_refused_whole(make, state):
    tuner, _, _ = make()
    good = {"key": {"gpu": "x"}, "choice": DEFAULT.to_record()}
    if isinstance(state, dict) and isinstance(state.get("choices"), list):
        state["choices"].insert(0, good)
    with pytest.raises(ConfigError, match=r"make it with Tuner\.state"):
        tuner.load_state(state)
    assert list(tuner.choices()) == []


def test_the_random_numbers_of_the_user_are_untouched(make):
    tuner, _, _ = make()
    a, b, out, bias = operands(FORWARD)
    given = Operands(tuner._engine.compress(a), b, out, bias)
    before = torch.get_rng_state()
    tuner.choose(FORWARD, -1, given)
    assert torch.equal(torch.get_rng_state(), before)


def test_known_problems_are_bounded(make, monkeypatch):
    monkeypatch.setattr("semisparse.gemm.tuner._REMEMBERED", 4)
    tuner, _, _ = make()
    for tokens in range(8, 8 * 20, 8):
        call(tuner, problems.grad_input(tokens, 16, 16, BF16))
        assert len(tuner._known) <= 4


def test_the_default_tuner_touches_nothing_until_used(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = tuner()
    assert made is tuner()
    assert list(tmp_path.iterdir()) == []


# ---- the shipped table


def test_the_table_that_ships_is_legal():
    assert isinstance(shipped.table(), tuple)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"gpu": 3}, "gpu"),
        ({"cusparselt": "800"}, "cusparselt"),
        ({"cusparselt": True}, "cusparselt"),
        ({"bias": 1}, "bias"),
        ({"rows": [32, 17]}, "rows"),
        ({"rows": [0, 17]}, "rows"),
        ({"columns": [1]}, "columns"),
        ({"columns": 5}, "columns"),
        ({"algorithm": -1}, "algorithm"),
        ({"algorithm": 3}, "algorithm"),
        ({"extra": 1}, "exactly the fields"),
    ],
)
def test_a_row_that_is_wrong_is_named(change, named):
    with pytest.raises(ValueError, match=named):
        shipped.parse(table([shipped_row(**change)]))


def test_the_first_row_that_applies_is_taken(make):
    key = make()[0].key(FORWARD, -1)
    rows = [shipped_row(columns=[65, 999]), shipped_row(algorithm=None), shipped_row(algorithm=2)]
    found = shipped.find(shipped.parse(table(rows)), key)
    assert (found.algorithm, found.sparse_algorithm) == (None, 2)
    for name in ("gpu", "dtype", "b_order", "d_order", "token_axis"):
        assert shipped.find(shipped.parse(table([shipped_row(**{name: "another"})])), key) is None
    for name in ("rows", "reduction", "columns"):
        assert shipped.find(shipped.parse(table([shipped_row(**{name: [key[name] + 1, 10**6]})])), key) is None
        assert shipped.find(shipped.parse(table([shipped_row(**{name: [key[name], key[name]]})])), key)
