"""An algorithm that ends the CUDA context is named, and what comes behind it is tried all the same."""

import sys
from collections.abc import Callable

import pytest
import torch

from semisparse.errors import EngineError
from semisparse.gemm import problem as problems
from tests.gemm.simulated import SimulatedLibrary
from tests.trust import algorithms
from tests.trust.machine import Machine
from tests.trust.outcome import Part, Row

TUNED = problems.forward(16, 64, 128, torch.float16)
SHORT = problems.activation_weight(16, 96, 160, torch.float16)
ERROR = "CUDA error: an illegal instruction was encountered"


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.setattr(algorithms, "SHAPES", [(16, 96, 160)])
    monkeypatch.setattr(algorithms, "of_shape", lambda at, shape: [SHORT, TUNED])
    monkeypatch.setattr(algorithms, "shipped", tuple)
    return Machine(torch.device("cpu"))


def fails(only: problems.Problem) -> Callable[[torch.Tensor], None]:
    def fault(out: torch.Tensor) -> None:
        if out.shape in (only.d_shape, only.d_shape[::-1]):
            raise torch.AcceleratorError(ERROR)

    return fault


def run(here: Machine) -> dict[str, Row]:
    tried = Part("algorithms", 60.0)
    algorithms.run(here, tried, repeats=2)
    return {row.what: row for row in tried.all_rows()}


def library(here: Machine) -> SimulatedLibrary:
    return here.engine._load()


def failed(rows: dict[str, Row]) -> list[str]:
    return [what for what, row in rows.items() if not row.passed]


def test_all_is_tried_where_nothing_fails(here: Machine) -> None:
    rows = run(here)
    assert not failed(rows)
    assert rows["shapes, with all algorithms"].figure == 1
    assert rows["algorithms that end the context"].figure == 0
    assert rows["products that the library refuses"].size == "of 1 shapes"
    assert rows["algorithms that were wrong once or more, and are listed"].size == "24 products of 2 problems"


def test_an_algorithm_that_the_autotuner_would_not_try_is_reported_and_the_next_ones_run(here: Machine) -> None:
    library(here).faults[2] = fails(SHORT)
    rows = run(here)
    assert not failed(rows)
    lost = rows["algorithms that end the context"]
    assert lost.faults == [f"2 of {SHORT}: AcceleratorError: {ERROR}"] and lost.figure == 1
    assert set(library(here).products) == set(range(6))
    assert rows["shapes, with all algorithms"].figure == 1


def test_one_that_it_would_try_and_a_default_fail(here: Machine) -> None:
    library(here).faults[5] = fails(TUNED)  # the last one: the next process has no algorithm left there
    rows = run(here)
    assert failed(rows) == ["algorithms that end the context and that the autotuner would try"]
    library(here).faults = {0: fails(SHORT)}
    assert failed(run(here)) == ["defaults of products that are not tuned that are wrong or end the context"]


def test_a_refusal_behind_which_the_context_is_lost_is_named(here: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(out: torch.Tensor) -> None:
        monkeypatch.setattr(here, "wait", lambda: fails(SHORT)(torch.empty(SHORT.d_shape)))
        raise EngineError("CUSPARSE_STATUS_EXECUTION_FAILED")

    library(here).faults[3] = refused
    assert run(here)["algorithms that end the context"].figure > 0


def test_too_many_of_one_product_and_too_many_at_all_are_said(here: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    library(here).faults = dict.fromkeys((1, 2, 3, 4), fails(SHORT))
    rows = run(here)
    assert rows["algorithms that end the context"].figure == algorithms.MOST_OF_ONE == 3
    assert rows["products that were left when 3 of their algorithms had ended the context"].faults == [str(SHORT)]
    monkeypatch.setattr(algorithms, "MOST_PROCESSES", 2)
    rows = run(here)
    left = "products that were not reached because the processes were used up"
    assert rows[left].figure == 1 and set(failed(rows)) == {left, "shapes, with all algorithms"}


def found(here: Machine) -> algorithms.Found:
    return algorithms.Found(here, Part("algorithms", 60.0), algorithms.tasks_of(here, 1000, 0), 1)


def test_a_process_tells_of_all_tasks(tmp_path) -> None:
    own = found(Machine(torch.device("cpu")))
    assert algorithms._process(tmp_path / "events", 1000, 0, own, (0, 0)) == 0
    assert own.ended(0) is None
    assert own.done == set(range(len(own.tasks))) and not own.part.raised


TOLD = '{"what": "begin", "task": 0}\\n{"what": "try", "task": 0, "place": 4, "algorithm": 7}\\n'


@pytest.mark.parametrize(("end", "why"), [("os.abort()", "exit code -6"), ("time.sleep(60)", "no word for 1 s")])
def test_a_process_that_is_gone_or_silent_costs_the_algorithm_that_it_tried(
    end: str, why: str, here: Machine, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = f"import os, sys, time; open(sys.argv[1], 'a').write('{TOLD}'); {end}"
    monkeypatch.setattr(algorithms, "COMMAND", (sys.executable, "-c", program))
    monkeypatch.setattr(algorithms, "SILENCE", 1.0)
    own = found(here)
    assert own.ended(algorithms._process(tmp_path / "events", 1000, 0, own, (0, 0))) == (0, 5)
    assert [(one["algorithm"], one["error"], one["problem"]) for one in own.lost] == [(7, why, str(TUNED))]


def test_a_process_that_never_begins_is_no_result(here: Machine, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(algorithms, "COMMAND", (sys.executable, "-c", "raise SystemExit(3)"))
    own = found(here)
    with pytest.raises(RuntimeError, match="before it had begun: 3"):
        own.ended(algorithms._process(tmp_path / "events", 1000, 0, own, (0, 0)))


def test_what_takes_long_is_named(here: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    own, seconds = found(here), iter((1.0, 5.0, 7.0, 7.5))
    own.heard = 0.0
    monkeypatch.setattr(algorithms.time, "monotonic", lambda: next(seconds))
    for at, what in ((0, "begin"), (0, "done"), (1, "begin"), (1, "done")):
        own.take({"what": what, "task": at})
    assert own.slowest() == {str(TUNED): 5.0, str(SHORT): 2.5}
    assert own.slowest(1) == {str(TUNED): 5.0}


def test_a_process_that_ends_between_two_products_blames_no_algorithm(here: Machine) -> None:
    own = found(here)
    for event in ({"what": "begin"}, {"what": "try", "place": 5, "algorithm": 5}, {"what": "done"}):
        own.take({"task": 0, **event})
    assert own.ended(-9) == (1, 0)
    assert [(one["algorithm"], one["error"]) for one in own.lost] == [(None, "exit code -9")]
