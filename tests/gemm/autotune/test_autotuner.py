"""When a problem is tuned, and where a choice comes from. See test_selection.py and test_candidates.py for the rest."""

import gc
import itertools
import logging
import re
import weakref
from dataclasses import replace

import pytest
import torch

from semisparse.errors import EngineError
from semisparse.gemm import problem as problems
from semisparse.gemm.autotune import selection
from semisparse.gemm.autotune.algorithm import Choice
from semisparse.gemm.autotune.autotuner import autotuner
from semisparse.gemm.operands import Operands
from tests.gemm import simulated
from tests.gemm.simulated import SimulatedLibrary, operands
from tests.gemm.tuning import FORWARD, call

BF16 = torch.bfloat16


def test_the_first_call_tunes_and_later_calls_do_not(make_tuner, timed):
    tuner, library, _ = make_tuner()
    choice = call(tuner)
    assert (choice.algorithm, choice.sparse_us, choice.dense_us, choice.source) == (4, 10.0, 50.0, "tuned")
    products = len(library.products)
    assert call(tuner) is choice
    assert tuner.known(FORWARD, -1) is choice
    assert (timed.made, len(library.products)) == (1, products)


def test_start_result_and_duration_of_tuning_are_logged_once(make_tuner, caplog):
    caplog.set_level(logging.INFO, "semisparse")
    tuner, _, _ = make_tuner()
    for _ in range(2):
        call(tuner)
    lines = [record.getMessage() for record in caplog.records if record.name == "semisparse.gemm.autotune.autotuner"]
    assert lines[0] == f"tuning {FORWARD} on device -1"
    assert re.fullmatch(rf"tuned {re.escape(str(FORWARD))} in \d\.\d\d s: cuSPARSELt algorithm 4 \(.*tuned\)", lines[1])
    assert len(lines) == 2


def test_wrong_algorithms_are_quarantined_end_to_end(make_tuner):
    library = SimulatedLibrary()
    runs = itertools.count()
    library.faults[4] = lambda out: out[0].add_(1)
    library.faults[3] = lambda out: out[0].add_(next(runs) == 2)
    library.faults[5] = lambda out: (_ for _ in ()).throw(torch.OutOfMemoryError("out of memory"))
    tuner, _, _ = make_tuner(library)
    choice = call(tuner)
    assert choice.algorithm == 2
    assert {number: reason.partition(":")[0] for number, reason in choice.rejected} == {
        3: "wrong",
        4: "wrong",
        5: "OutOfMemoryError",
    }


def test_dense_is_chosen_where_it_is_faster(make_tuner, timed):
    timed.dense_us = 9.0
    choice = call(make_tuner()[0])
    assert (choice.algorithm, choice.sparse_algorithm) == (None, 4)
    assert call(make_tuner(stored=False)[0], dense=False).algorithm == 4


def test_token_counts_of_one_bucket_share_a_result_and_n_and_k_do_not(make_tuner, timed):
    tuner, _, _ = make_tuner()
    for tokens in range(1025, 1281):
        call(tuner, problems.grad_input(tokens, 32, 48, BF16))
    assert timed.made == 1
    call(tuner, problems.grad_input(1281, 32, 48, BF16))
    assert timed.made == 2
    call(tuner, problems.grad_input(1025, 32, 64, BF16))
    assert timed.made == 3


def test_fp8_products_are_tuned_apart_by_what_they_write_and_shared_through_the_disk(make_tuner, timed):
    bf16, fp32 = (problems.fp8_forward(24, 32, 96, dtype) for dtype in (BF16, torch.float32))
    tuner = make_tuner()[0]
    for problem in (bf16, fp32):
        assert call(tuner, problem).sparse_algorithm == 4
    assert timed.made == 2
    for problem in (bf16, fp32):
        assert call(make_tuner()[0], problem).source == "disk"
    assert timed.made == 2
    keys = [tuner.key(problem, -1) for problem in (bf16, fp32)]
    assert [(key["dtype"], key["out_dtype"]) for key in keys] == [
        ("float8_e4m3fn", "bfloat16"),
        ("float8_e4m3fn", "float32"),
    ]


def test_the_keys_of_16_bit_products_are_those_of_earlier_versions(make_tuner):
    """Stored choices are found by them."""
    tuner, _, runtime = make_tuner()
    assert tuner.key(FORWARD, -1) == {
        **runtime.identity(-1), "cusparselt": 800, "dtype": "bfloat16", "b_order": "column", "d_order": "column",
        "bias": False, "token_axis": "columns", "rows": 32, "reduction": 48, "columns": 24,
    }  # fmt: skip


def test_plans_of_losers_are_freed(make_tuner):
    tuner, _, _ = make_tuner()
    call(tuner)
    assert tuner._engine.plan_count(-1) == 1


def test_a_second_process_takes_the_choice_from_disk(make_tuner, timed):
    first = call(make_tuner()[0])
    tuner, library, _ = make_tuner()
    second = call(tuner)
    assert second == replace(first, source="disk")
    assert timed.made == 1
    assert library.products == []


@pytest.mark.parametrize("name", ["gpu", "sm_count", "capability", "driver", "cuda", "torch", "triton"])
def test_a_choice_of_another_environment_is_not_used(make_tuner, timed, name):
    call(make_tuner()[0])
    tuner, _, runtime = make_tuner()
    identity = runtime.identity(-1)
    runtime.identity = lambda index: identity | {name: "another"}
    assert call(tuner).source == "tuned"
    assert timed.made == 2


def test_a_choice_of_another_library_version_is_not_used(make_tuner, timed):
    call(make_tuner(SimulatedLibrary(version=800))[0])
    assert call(make_tuner(SimulatedLibrary(version=801))[0]).source == "tuned"
    assert timed.made == 2


def test_a_stored_algorithm_that_the_library_does_not_offer_is_ignored_and_logged(make_tuner, caplog):
    tuner, _, _ = make_tuner()
    key = tuner.key(FORWARD, -1)
    tuner._store.save(key, Choice(30, 30, 1.0, 2.0, "tuned"))
    assert call(tuner).algorithm == 4
    assert "'disk'): algorithm 30 is not among the 6 that the library offers for 32x48" in caplog.text
    assert call(make_tuner()[0]).algorithm == 4


def test_a_damaged_file_costs_a_tuning_run(make_tuner, timed, tmp_path, caplog):
    call(make_tuner()[0])
    for path in (tmp_path / "semisparse").iterdir():
        path.write_text("{")
    assert call(make_tuner()[0]).source == "tuned"
    assert "ignored the stored tuning result" in caplog.text
    assert call(make_tuner()[0]).source == "disk"
    assert timed.made == 2


@pytest.mark.parametrize("fault", [torch.OutOfMemoryError("out of memory"), None])
def test_a_choice_that_was_disturbed_stays_in_this_process(make_tuner, timed, fault):
    library = SimulatedLibrary()
    if fault is not None:
        library.faults[4] = lambda out: (_ for _ in ()).throw(fault)
    call(make_tuner(library)[0])
    assert call(make_tuner()[0]).source == ("disk" if fault is None else "tuned")


def test_a_problem_the_library_refuses_goes_dense_with_a_note(make_tuner):
    tuner, library, _ = make_tuner()
    tuner._engine.available()
    packed = torch.zeros(1, dtype=torch.uint8)
    library.refuse["matmul"] = 10
    _, b, out, _ = operands(FORWARD)
    choice = tuner.choose(FORWARD, -1, Operands(packed, b, out), lambda *given: None)
    assert (choice.algorithm, choice.sparse_algorithm) == (None, None)
    assert "NOT_SUPPORTED" in choice.note


def test_the_users_error_in_an_operand_is_not_taken_for_a_bad_algorithm(make_tuner):
    tuner, _, _ = make_tuner()
    _, b, out, _ = operands(FORWARD)
    with pytest.raises(ValueError, match="packed has shape"):
        tuner.choose(FORWARD, -1, Operands(torch.zeros(8, dtype=torch.uint8), b, out))
    assert tuner.known(FORWARD, -1) is None
    assert call(tuner).algorithm == 4


@pytest.mark.parametrize("tune", ["0", "1"])
@pytest.mark.parametrize("capturing", [False, True])
def test_without_an_engine_the_choice_is_dense_whatever_the_mode(make_tuner, monkeypatch, tune, capturing):
    monkeypatch.setenv("SEMISPARSE_TUNE", tune)
    tuner, _, runtime = make_tuner(SimulatedLibrary(version=700))
    runtime.is_capturing = capturing
    _, b, out, _ = operands(FORWARD)
    choice = tuner.choose(FORWARD, -1, Operands(torch.zeros(8, dtype=torch.uint8), b, out))
    assert (choice.algorithm, choice.sparse_algorithm, choice.source) == (None, None, "default")
    assert "0.7.0 is older than 0.8.0" in choice.note
    assert tuner.known(FORWARD, -1) is choice
    assert tuner.state()["choices"] == []


def test_nothing_of_a_trial_outlives_the_tuning(make_tuner, timed):
    """Not even until the next garbage collection: it would hold device memory."""
    watched = []

    class Watched(timed):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            watched.extend([weakref.ref(self), weakref.ref(self._sample.b), weakref.ref(self._sample.expected[0])])

    library = SimulatedLibrary()
    library.faults[2] = lambda out: (_ for _ in ()).throw(torch.OutOfMemoryError("out of memory"))
    tuner, _, _ = make_tuner(library, make_candidates=Watched)
    gc.collect()
    gc.disable()
    try:
        call(tuner)
        assert [reference() for reference in watched] == [None] * 3
    finally:
        gc.enable()


def test_the_random_numbers_of_the_user_are_untouched(make_tuner):
    tuner, _, _ = make_tuner()
    a, b, out, bias = operands(FORWARD)
    given = Operands(tuner._engine.compress(a), b, out, bias)
    before = torch.get_rng_state()
    tuner.choose(FORWARD, -1, given)
    assert torch.equal(torch.get_rng_state(), before)


def test_known_problems_are_bounded(make_tuner, monkeypatch):
    monkeypatch.setattr("semisparse.gemm.autotune.autotuner._REMEMBERED", 4)
    tuner, _, _ = make_tuner()
    for tokens in range(8, 8 * 20, 8):
        call(tuner, problems.grad_input(tokens, 16, 16, BF16))
        assert len(tuner._known) <= 4


def test_the_default_tuner_touches_nothing_until_used(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = autotuner()
    assert made is autotuner()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("problem", "first"),
    [
        (problems.grad_input(24, 32, 48, BF16), [17, 20, 12, 0, 15, 14, 1]),
        (problems.grad_input(24, 32, 48, torch.float16), [6, 5, 27, 1, 28, 7, 13]),
        (problems.fp8_grad_input(24, 32, 96, BF16), [8, 16, 17, 19, 21, 6, 18]),
    ],
    ids=str,
)
def test_the_likely_algorithms_are_tried_first_since_not_all_may_be_reached(
    make_tuner, timed, monkeypatch, problem, first
):
    monkeypatch.setattr(simulated, "ALGORITHMS", 30)
    order = []

    class Noting(timed):
        def time(self, algorithm, repeats):
            order.append(algorithm)
            return super().time(algorithm, repeats)

    call(make_tuner(stored=False, make_candidates=Noting)[0], problem)
    tried = list(dict.fromkeys(number for number in order if number is not None))
    assert tried[:7] == first
    assert tried[7:] == [number for number in range(30) if number not in first]


def test_what_the_caller_has_queued_and_the_preparation_do_not_count(make_tuner, timed, monkeypatch):
    """The first is waited for before the clock starts, the second comes before the time that a problem may take."""
    happened, now, given = [], [100.0], []

    class Slow(timed):
        def __init__(self, *arguments):
            happened.append("trial")
            now[0] += 0.375
            super().__init__(*arguments)

    class Noted(selection.Selection):
        def __init__(self, trial, clock, seconds):
            given.append(seconds)
            super().__init__(trial, clock, seconds)

    def clock():
        happened.append("clock")
        return now[0]

    monkeypatch.setattr("semisparse.gemm.autotune.autotuner.Selection", Noted)
    tuner, _, runtime = make_tuner(stored=False, make_candidates=Slow, clock=clock, seconds=0.5)
    runtime.wait = lambda index: happened.append(f"wait {index}")
    call(tuner)
    assert happened[:3] == ["wait -1", "clock", "trial"]
    assert given == [0.5]


@pytest.mark.parametrize("problem", [FORWARD, problems.forward(24, 32, 48, torch.float16, bias=True)], ids=str)
def test_a_library_that_is_slow_to_look_at_a_problem_is_asked_once_for_all_algorithms(make_tuner, timed, problem):
    """As cuSPARSELt 0.8.0 is for fp16: with a selection for each plan, one algorithm took all of the time."""
    now, selections = [0.0], []

    class Slow(SimulatedLibrary):
        def matmul_alg_selection_init(self, *arguments):
            now[0] += 0.3
            selections.append(arguments)
            return super().matmul_alg_selection_init(*arguments)

    class Running(timed):
        def time(self, algorithm, repeats, chunk=None):
            if algorithm is not None:
                self._engine.matmul(self._problem, algorithm, self._operands)
            return super().time(algorithm, repeats, chunk)

    tuner, library, _ = make_tuner(Slow(), stored=False, make_candidates=Running, clock=lambda: now[0])
    choice = call(tuner, problem)
    assert choice.algorithm == 4 and choice.rejected == ()
    assert len(selections) == 1 + problem.bias  # one more finds out whether plans follow a bias
    assert sum(kind == "plan" for kind, _ in library.live.values()) == 1
    tuner._engine.close()
    assert library.live == {}


def test_a_product_without_algorithms_is_not_tuned_and_nothing_stays(make_tuner, caplog):
    tuner, library, _ = make_tuner(stored=False)

    def refuse(problem, index):
        raise EngineError("no algorithms")

    tuner._engine.algorithms = refuse
    assert call(tuner).note == "EngineError: no algorithms" and "cannot be tuned" in caplog.text
    assert {kind for kind, _ in library.live.values()} == {"handle"}
