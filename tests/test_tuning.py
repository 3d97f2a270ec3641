"""The public door to the autotuner's choices."""

import json
from typing import Any

import pytest
import torch
import torch.multiprocessing

from semisparse import tuning
from semisparse.errors import ConfigError
from semisparse.gemm.autotune import tiles
from semisparse.gemm.autotune.autotuner import Autotuner
from tests.distributed import tuning as ranks
from tests.distributed.test_ddp_fsdp import loopback
from tests.gemm.simulated import make_engine
from tests.gemm.tuning import Timed, call


@pytest.fixture
def tuned(monkeypatch: pytest.MonkeyPatch) -> Autotuner:
    """The process's autotuner, with one problem tuned on the simulated library."""
    monkeypatch.setattr(tiles, "TILE", dict.fromkeys(tiles.TILE, 1))  # so that small products are tuned
    made = Autotuner(make_engine()[0], None, make_candidates=Timed)
    call(made)
    monkeypatch.setattr(tuning, "autotuner", lambda: made)
    return made


def test_choices_are_listed_with_what_they_depend_on(tuned: Autotuner) -> None:
    ((key, choice),) = tuning.choices()
    assert (key["gpu"], key["columns"], choice.algorithm, choice.source) == ("Simulated", 24, 4, "tuned")
    assert isinstance(choice, tuning.Choice)


def test_a_state_goes_through_json_and_is_adopted(tuned: Autotuner, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = json.loads(json.dumps(tuning.state()))
    other = Autotuner(make_engine()[0], None, make_candidates=Timed)
    monkeypatch.setattr(tuning, "autotuner", lambda: other)
    assert tuning.choices() == []
    assert tuning.load_state(sent) == 1
    assert (call(other).algorithm, call(other).source) == (4, "shared")


def test_a_damaged_state_is_refused(tuned: Autotuner) -> None:
    with pytest.raises(ConfigError, match=r"make it with tuning\.state"):
        tuning.load_state({"schema": 2, "choices": []})


def test_without_ranks_there_is_nothing_to_share() -> None:
    with pytest.raises(ConfigError, match="call init_process_group first"):
        tuning.share()


@pytest.fixture(scope="module")
def ranked(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two ranks found; they are started once for all tests."""
    folder = tmp_path_factory.mktemp("ranks")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("GLOO_SOCKET_IFNAME", loopback())
        torch.multiprocessing.spawn(ranks.worker, args=(str(folder),), nprocs=ranks.WORLD)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(ranks.WORLD)]


def test_all_ranks_use_the_choices_of_all_and_the_lowest_rank_decides(ranked: list[dict[str, Any]]) -> None:
    assert [record["known"] for record in ranked] == [{"both": 3, "first": 1, "second": 7}] * 2
    assert [record["counts"] for record in ranked] == [[2, 3], [0, 3]]


def test_ranks_that_tune_a_model_divide_the_work_and_end_with_the_same_choices(ranked: list[dict[str, Any]]) -> None:
    first, second = ranked
    assert first["outcomes"] == second["outcomes"] == ["tuned"] * 4
    assert first["measured"] == second["measured"] == 2
    assert first["choices"] == second["choices"] == [(columns, 4) for columns in (8, 16, 24, 32)]


def test_a_rank_that_fails_ends_all_ranks(ranked: list[dict[str, Any]]) -> None:
    first, second = ranked
    assert first["error"] == "RuntimeError: mine"
    assert second["error"] == "RankMismatchError: rank 0 of the group failed while tuning: RuntimeError: mine"
