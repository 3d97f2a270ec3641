"""No algorithm is used that the engine does not offer, wherever its id comes from.

For fp16 the real library offers 52, and those from 36 on end in an illegal instruction: here it offers 52 as well.
"""

import pytest

from semisparse.errors import EngineError
from semisparse.gemm.autotune.algorithm import Choice
from semisparse.gemm.autotune.autotuner import DEFAULT
from semisparse.gemm.cusparselt import ALGORITHMS
from semisparse.gemm.dispatch import multiply
from semisparse.gemm.operands import Operands
from tests.gemm import simulated
from tests.gemm.simulated import make_engine, operands, run, unpack
from tests.gemm.tuning import FORWARD, call, shipped_entry

NOT_OFFERED = [36, 51, 52, 900]


@pytest.fixture(autouse=True)
def many_algorithms(monkeypatch):
    monkeypatch.setattr(simulated, "ALGORITHMS", 52)


def chosen(algorithm):
    return Choice(algorithm, algorithm, 1.0, 2.0, "tuned")


def test_ids_from_36_on_are_not_offered():
    engine, _, _ = make_engine()
    assert ALGORITHMS == 36
    assert engine.algorithms(FORWARD, -1) == range(36)


@pytest.mark.parametrize("algorithm", [-1, *NOT_OFFERED])
def test_the_engine_itself_runs_no_other_algorithm(algorithm):
    engine, library, _ = make_engine()
    run(engine, FORWARD, 35)
    with pytest.raises(EngineError, match=f"algorithm={algorithm} is not offered for 32x48.*ids are 0 to 35: take one"):
        run(engine, FORWARD, algorithm)
    assert library.products == [35]
    engine.close()
    assert library.live == {}


def loaded(make_tuner, algorithm):
    other, _, _ = make_tuner(stored=False)
    tuner, library, _ = make_tuner(stored=False)
    entry = {"key": other.key(FORWARD, -1), "choice": chosen(algorithm).to_record()}
    assert tuner.load_state({"schema": 1, "choices": [entry]}) == 1
    return tuner, library


def stored(make_tuner, algorithm):
    tuner, library, _ = make_tuner()
    tuner._store.save(tuner.key(FORWARD, -1), chosen(algorithm))
    return tuner, library


@pytest.mark.parametrize("algorithm", NOT_OFFERED)
@pytest.mark.parametrize(("source", "given"), [("shared", loaded), ("disk", stored)])
def test_a_choice_of_another_algorithm_is_dropped_and_the_problem_tuned_anew(
    make_tuner, timed, caplog, source, given, algorithm
):
    tuner, library = given(make_tuner, algorithm)
    choice = call(tuner)
    (record,) = caplog.records
    assert f"source '{source}'): algorithm {algorithm} is not among the 36" in record.getMessage()
    assert (choice.algorithm, choice.source, timed.made) == (4, "tuned", 1)
    assert algorithm not in library.products
    assert call(tuner) is choice
    assert [entry["choice"]["algorithm"] for entry in tuner.state()["choices"]] == [4]


@pytest.mark.parametrize(("source", "given"), [("shared", loaded), ("disk", stored)])
def test_the_last_offered_algorithm_is_used(make_tuner, timed, caplog, source, given):
    tuner, _ = given(make_tuner, 35)
    assert (call(tuner).algorithm, call(tuner).source, timed.made) == (35, source, 0)
    assert not caplog.records


@pytest.mark.parametrize("algorithm", NOT_OFFERED)
def test_where_tuning_is_off_the_default_takes_its_place(make_tuner, monkeypatch, caplog, algorithm):
    monkeypatch.setenv("SEMISPARSE_TUNE", "0")
    for given in (loaded, stored):
        tuner, _ = given(make_tuner, algorithm)
        assert call(tuner) is DEFAULT
    entry = shipped_entry(algorithm, algorithm)
    assert call(make_tuner(stored=False, shipped=[entry])[0]) is DEFAULT
    for source in ("shared", "disk", "shipped"):
        assert f"source '{source}'): algorithm {algorithm} is not among the 36" in caplog.text


def test_a_choice_on_disk_serves_where_the_shared_one_is_dropped(make_tuner, timed, caplog):
    tuner, _, _ = make_tuner()
    tuner._store.save(tuner.key(FORWARD, -1), chosen(7))
    tuner.load_state({"schema": 1, "choices": [{"key": tuner.key(FORWARD, -1), "choice": chosen(40).to_record()}]})
    assert (call(tuner).algorithm, timed.made) == (7, 0)
    assert "source 'shared'" in caplog.text


def test_a_dense_choice_names_no_algorithm_to_run_but_the_one_it_keeps_is_checked_too(make_tuner, timed):
    """backend="cusparselt" would run it."""
    tuner, _, _ = make_tuner(stored=False)
    record = Choice(None, 40, 9.0, 1.0, "tuned").to_record()
    tuner.load_state({"schema": 1, "choices": [{"key": tuner.key(FORWARD, -1), "choice": record}]})
    a, b, out, _ = operands(FORWARD)
    packed = tuner._engine.compress(a)
    choice = multiply(
        FORWARD,
        Operands(packed, b, out),
        lambda buffer: unpack(buffer, FORWARD.rows, FORWARD.reduction, FORWARD.dtype),
        "cusparselt",
        engine=tuner._engine,
        tuner=tuner,
    )
    assert (choice.sparse_algorithm, timed.made) == (4, 1)


def test_where_the_library_offers_none_the_choice_is_dense_and_says_so(make_tuner, monkeypatch):
    monkeypatch.setattr(simulated, "ALGORITHMS", 0)
    monkeypatch.setenv("SEMISPARSE_TUNE", "0")
    choice = call(make_tuner(stored=False)[0])
    assert (choice.algorithm, choice.sparse_algorithm, choice.note) == (None, None, "the library offers no algorithm")


def test_a_state_loaded_where_a_default_served_replaces_it(make_tuner, monkeypatch):
    """With tuning off a problem that was met keeps its default, but only until a measured choice comes."""
    monkeypatch.setenv("SEMISPARSE_TUNE", "0")
    tuner, _, _ = make_tuner(stored=False)
    assert call(tuner) is DEFAULT
    tuner.load_state({"schema": 1, "choices": [{"key": tuner.key(FORWARD, -1), "choice": chosen(9).to_record()}]})
    assert (call(tuner).algorithm, call(tuner).source) == (9, "shared")
