"""Products that are shorter than a kernel's tile are not tuned, and a crash while tuning is a typed error."""

import gc
import json
import logging

import pytest
import torch

from semisparse.errors import ContextLostError, EngineError
from semisparse.formats.layout import FP8
from semisparse.gemm import problem as problems
from semisparse.gemm.autotune.algorithm import Choice
from semisparse.gemm.autotune.autotuner import Autotuner
from semisparse.gemm.autotune.store import Store, shipped, to_document
from semisparse.gemm.autotune.tiles import TILE, not_tuned
from tests.gemm.simulated import SimulatedLibrary
from tests.gemm.tuning import call

SHORT = problems.activation_weight(16, 96, 160, torch.float16)
"""The product whose algorithm ended the context on one H100."""

LONG = problems.activation_weight(64, 96, 160, torch.float16)
WHY = "not tuned: a reduction of 16 is shorter than the 64 that a kernel takes at a time"


def stored(tuner: Autotuner) -> None:
    tuner._store.save(tuner.key(SHORT, -1), Choice(3, 3, 1.0, 2.0, "tuned"))


def shared(tuner: Autotuner) -> None:
    tuner.load_state(json.loads(json.dumps(to_document([(tuner.key(SHORT, -1), Choice(3, 3, 1.0, 2.0, "tuned"))]))))


@pytest.mark.parametrize("setting", ["1", "all", "0"])
def test_no_algorithm_but_the_default_runs_for_a_short_product(make_tuner, timed, monkeypatch, setting):
    monkeypatch.setenv("SEMISPARSE_TUNE", setting)
    tuner, library, _ = make_tuner()
    choice = call(tuner, SHORT)
    assert choice == Choice(0, 0, None, None, "default", note=WHY)
    assert str(choice) == f"cuSPARSELt algorithm 0 ({WHY})"
    assert (timed.made, library.products) == (0, [])
    assert tuner.known(SHORT, -1) is tuner.find(SHORT, -1) is choice
    assert tuner.choices() == [] and Store.load(tuner._store, tuner.key(SHORT, -1)) is None


def test_from_one_tile_on_products_are_tuned(make_tuner, timed):
    assert call(make_tuner()[0], LONG).source == "tuned"
    assert timed.made == 1


@pytest.mark.parametrize(("dtype", "tile"), [(torch.bfloat16, 64), (torch.float16, 64), (FP8, 128)])
def test_the_rule_is_about_the_reduction_alone(dtype, tile):
    out = torch.bfloat16 if dtype is FP8 else dtype
    for reduction in range(32, 2 * tile, 32):
        short = not_tuned(problems.Problem(4096, reduction, 16, dtype, token_axis="reduction", out_dtype=out))
        assert bool(short) == (reduction < tile)
    assert not not_tuned(problems.Problem(32, tile, 16, dtype, out_dtype=out))
    assert TILE[dtype] == tile


@pytest.mark.parametrize("bring", [stored, shared], ids=["disk", "shared"])
def test_a_choice_for_a_short_product_is_ignored_and_that_is_said(make_tuner, caplog, bring):
    tuner, _, _ = make_tuner()
    bring(tuner)
    assert call(tuner, SHORT).note == WHY
    source = "disk" if bring is stored else "shared"
    assert f"ignored a choice (source '{source}') for {SHORT}: {WHY}" in caplog.text
    assert tuner.state()["choices"] == []


def test_a_shipped_choice_for_a_short_product_is_ignored_and_that_is_said(make_tuner, caplog):
    conditions = {"gpu": "Simulated", **SHORT.bucket.key()}
    tuner, _, _ = make_tuner(shipped=[(conditions, Choice(3, 3, None, None, "shipped"))])
    assert call(tuner, SHORT).note == WHY
    assert "ignored a choice (source 'shipped')" in caplog.text
    assert all(key.get("reduction", 4096) >= 128 for key, _ in shipped())


def test_a_capture_runs_the_default_for_a_short_product(make_tuner):
    tuner, _, runtime = make_tuner()
    runtime.capturing = lambda: True
    assert call(tuner, SHORT).note == WHY
    with pytest.raises(EngineError, match="no algorithm has been chosen yet"):
        call(tuner, LONG)


def crash(*given: object) -> None:
    raise torch.AcceleratorError("CUDA error: an illegal instruction was encountered")


def test_an_algorithm_that_ends_the_context_is_named_and_nothing_goes_on(make_tuner, caplog):
    library = SimulatedLibrary()
    library.faults[4] = crash
    tuner, _, _ = make_tuner(library)
    caplog.set_level(logging.INFO, "semisparse")
    library.log.clear()
    with pytest.raises(ContextLostError) as caught:
        call(tuner, LONG)
    gc.collect()
    assert not {"plan", "selection", "matmul"} & {kind for kind, _ in library.log}  # the library is not called any more
    said = str(caught.value)
    assert said.startswith(f"algorithm 4 of cuSPARSELt ended in an error of the GPU while it was tried for {LONG} (")
    assert "an illegal instruction was encountered" in said and "SEMISPARSE_TUNE=0" in said
    assert library.products[-1] == 4  # the fastest, checked first: none was tried after it
    assert tuner.known(LONG, -1) is None and tuner.choices() == []
    assert tuner._store.load(tuner.key(LONG, -1)) is None


def test_a_refusal_behind_which_the_context_is_lost_is_no_refusal(make_tuner):
    """The library reports a launch that failed as one of its own errors, which is otherwise a reason to go on."""

    def refused(out):
        runtime.wait = crash
        raise EngineError("CUSPARSE_STATUS_EXECUTION_FAILED")

    library = SimulatedLibrary()
    library.faults[4] = refused
    tuner, _, runtime = make_tuner(library)
    with pytest.raises(ContextLostError, match="algorithm 4"):
        call(tuner, LONG)
    library.faults[4] = lambda out: (_ for _ in ()).throw(EngineError("CUSPARSE_STATUS_NOT_SUPPORTED"))
    tuner, _, _ = make_tuner(library)
    choice = call(tuner, LONG)
    assert choice.algorithm not in (None, 4) and dict(choice.rejected)[4].startswith("EngineError")
