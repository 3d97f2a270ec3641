"""Where nothing may be timed: tuning switched off, deterministic mode, CUDA graph capture."""

from dataclasses import replace

import pytest
import torch

from semisparse.errors import ConfigError, EngineError
from semisparse.gemm import problem as problems
from semisparse.gemm.autotune.algorithm import Choice
from semisparse.gemm.autotune.autotuner import DEFAULT
from semisparse.gemm.operands import Operands
from tests.gemm.simulated import operands
from tests.gemm.tuning import FORWARD, call, shipped_entry

BF16 = torch.bfloat16
NEAR = 40
"""A bucket of tokens that is not FORWARD's, and less than twice as large."""

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


@off
@pytest.mark.usefixtures("no_tuning")
def test_without_tuning_the_default_is_algorithm_0(make_tuner, timed):
    tuner, library, _ = make_tuner()
    assert call(tuner) == DEFAULT == Choice(0, 0, None, None, "default")
    assert call(tuner) is DEFAULT
    assert timed.made == 0
    assert library.products == []


@off
@pytest.mark.usefixtures("no_tuning")
def test_without_tuning_a_refused_problem_goes_dense(make_tuner):
    tuner, library, _ = make_tuner()
    tuner._engine.available()
    library.refuse["matmul"] = 10
    _, b, out, _ = operands(FORWARD)
    choice = tuner.choose(FORWARD, -1, Operands(torch.zeros(8, dtype=torch.uint8), b, out))
    assert (choice.algorithm, choice.source) == (None, "default")
    assert "NOT_SUPPORTED" in choice.note


@off
@pytest.mark.usefixtures("no_tuning")
def test_without_tuning_the_shipped_table_serves_before_the_default(make_tuner, caplog):
    choice = call(make_tuner(shipped=[shipped_entry(columns=NEAR)])[0])
    assert (choice.algorithm, choice.source) == (2, "shipped")
    assert call(make_tuner(shipped=[shipped_entry(gpu="Another")])[0]) is DEFAULT
    assert call(make_tuner(shipped=[shipped_entry(77, 77)])[0]) is DEFAULT
    assert "source 'shipped'): algorithm 77 is not among the 6" in caplog.text


def test_without_tuning_a_stored_choice_serves_before_both(make_tuner, monkeypatch):
    tuned = call(make_tuner()[0])
    monkeypatch.setenv("SEMISPARSE_TUNE", "0")
    assert call(make_tuner(shipped=[shipped_entry()])[0]) == replace(tuned, source="disk")


def test_the_variable_is_read_at_each_new_problem_and_a_default_is_not_kept(make_tuner, timed, monkeypatch):
    tuner, _, _ = make_tuner()
    monkeypatch.setenv("SEMISPARSE_TUNE", "0")
    assert call(tuner) is DEFAULT
    monkeypatch.setenv("SEMISPARSE_TUNE", "1")
    assert call(tuner).source == "tuned"
    monkeypatch.setenv("SEMISPARSE_TUNE", "0")
    assert call(tuner).source == "tuned"
    monkeypatch.setenv("SEMISPARSE_TUNE", "yes")
    with pytest.raises(ConfigError, match="SEMISPARSE_TUNE='yes'"):
        call(tuner, problems.grad_input(24, 32, 48, BF16))


def test_a_default_is_neither_written_nor_shared(make_tuner, monkeypatch):
    monkeypatch.setenv("SEMISPARSE_TUNE", "0")
    tuner, _, _ = make_tuner(shipped=[shipped_entry()])
    call(tuner)
    assert tuner.state()["choices"] == []
    assert not tuner._store._folder.exists()


def test_inside_a_pause_nothing_is_measured_and_after_it_again(make_tuner, timed):
    tuner, _, _ = make_tuner()
    with tuner.paused():
        assert call(tuner) is DEFAULT
        with tuner.paused():
            pass
        assert tuner.off
    assert timed.made == 0
    assert call(tuner).source == "tuned"


# ---- capture


def test_a_cold_capture_raises_and_names_the_way_out(make_tuner, timed):
    tuner, library, runtime = make_tuner()
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


def test_a_cold_capture_uses_what_is_stored_or_near_what_is_shipped(make_tuner):
    tuner, _, runtime = make_tuner(shipped=[shipped_entry(columns=NEAR)])
    runtime.is_capturing = True
    assert call(tuner).source == "shipped"
    runtime.is_capturing = False
    assert call(tuner).source == "tuned"  # of another bucket: not instead of tuning
    tuner, _, runtime = make_tuner()
    runtime.is_capturing = True
    assert call(tuner).source == "disk"


@off
@pytest.mark.usefixtures("no_tuning")
def test_a_capture_without_tuning_uses_the_default(make_tuner):
    tuner, _, runtime = make_tuner()
    runtime.is_capturing = True
    assert call(tuner) is DEFAULT
