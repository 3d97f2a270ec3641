"""No algorithm is used that the engine does not offer, wherever its id comes from.

For fp16 the real library offers 52, and those from 36 on, for one kind of product from 34 on, end in an illegal
instruction: here it offers 52 as well.
"""

import pytest
import torch

from semisparse.errors import EngineError
from semisparse.gemm import problem as problems
from semisparse.gemm.autotune.algorithm import Choice
from semisparse.gemm.autotune.autotuner import DEFAULT
from semisparse.gemm.autotune.store import shipped
from semisparse.gemm.cusparselt import ALGORITHMS
from semisparse.gemm.dispatch import multiply
from semisparse.gemm.operands import Operands
from tests.gemm import simulated
from tests.gemm.simulated import make_engine, operands, run, unpack
from tests.gemm.tuning import FORWARD, call, shipped_entry

NOT_OFFERED = [36, 51, 52, 900]
FP16 = problems.activation_weight(128, 96, 160, torch.float16)


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


@pytest.mark.parametrize("algorithm", [34, 35])
def test_for_fp16_from_row_into_column_order_ids_from_34_on_are_not_offered(algorithm):
    engine, library, _ = make_engine()
    assert (FP16.b_order, FP16.d_order) == ("row", "column")
    assert engine.algorithms(FP16, -1) == range(34)
    with pytest.raises(EngineError, match=f"algorithm={algorithm} is not offered for .*ids are 0 to 33: take one"):
        run(engine, FP16, algorithm)
    assert library.products == []


def test_other_kinds_of_products_keep_all_36():
    engine, _, _ = make_engine()
    kinds = [
        problems.forward(64, 96, 128, torch.float16),
        problems.grad_input(64, 96, 128, torch.float16),
        problems.activation_forward(64, 96, 128, torch.float16),
        problems.sampled_weight(64, 96, 128, torch.float16),
        problems.activation_weight(64, 96, 128, torch.bfloat16),
    ]
    for kind in kinds:
        assert engine.algorithms(kind, -1) == range(36)


@pytest.fixture
def last_are_fastest(timed, monkeypatch):
    monkeypatch.setattr(
        timed, "time", lambda self, algorithm, *_, **__: 90.0 if algorithm is None else 10.0 + abs(algorithm - 35)
    )


@pytest.mark.usefixtures("last_are_fastest")
@pytest.mark.parametrize(("dtype", "fastest"), [(torch.float16, 33), (torch.bfloat16, 35)], ids=str)
def test_they_are_not_tried_either(make_tuner, dtype, fastest):
    tuner, library, _ = make_tuner()
    choice = call(tuner, problems.activation_weight(128, 96, 160, dtype))
    assert choice.sparse_algorithm == fastest
    tried = {*library.products, *dict(choice.rejected)}
    assert not tried & {34, 35} if dtype is torch.float16 else 35 in tried


@pytest.mark.usefixtures("last_are_fastest")
@pytest.mark.parametrize("source", ["disk", "shared", "shipped"])
def test_a_choice_of_such_an_algorithm_is_ignored_and_that_is_said(make_tuner, caplog, source):
    rows = [({"gpu": "Simulated", **FP16.bucket.key()}, chosen(35))] if source == "shipped" else []
    tuner, library, _ = make_tuner(shipped=rows)
    if source == "disk":
        tuner._store.save(tuner.key(FP16, -1), chosen(35))
    if source == "shared":
        entry = {"key": tuner.key(FP16, -1), "choice": chosen(35).to_record()}
        assert tuner.load_state({"schema": 1, "choices": [entry]}) == 1
    choice = call(tuner, FP16)
    assert choice.source == "tuned" and choice.sparse_algorithm not in (34, 35)
    assert 35 not in library.products
    assert "algorithm 35 is not among the 34 that the library offers for" in caplog.text


def test_nothing_that_ships_names_an_algorithm_that_is_not_offered():
    for key, choice in shipped():
        if "b_order" in key and choice.sparse_algorithm is not None:
            kind = key["dtype"], key["b_order"], key["d_order"]
            assert choice.sparse_algorithm < (34 if kind == ("float16", "row", "column") else 36)


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
