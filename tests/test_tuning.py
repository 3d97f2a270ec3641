"""The public door to the autotuner's choices."""

import json
from pathlib import Path

import pytest
import torch
import torch.multiprocessing

from semisparse import tuning
from semisparse.errors import ConfigError
from semisparse.gemm.autotune.autotuner import Autotuner
from tests.distributed import tuning as ranks
from tests.distributed.test_ddp_fsdp import loopback
from tests.gemm.simulated import make_engine
from tests.gemm.tuning import Timed, call


@pytest.fixture
def tuned(monkeypatch: pytest.MonkeyPatch) -> Autotuner:
    """The process's autotuner, with one problem tuned on the simulated library."""
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


def test_all_ranks_use_the_choices_of_all_and_the_lowest_rank_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", loopback())
    torch.multiprocessing.spawn(ranks.worker, args=(str(tmp_path),), nprocs=ranks.WORLD)
    found = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(ranks.WORLD)]
    assert [record["known"] for record in found] == [{"both": 3, "first": 1, "second": 7}] * 2
    assert [record["counts"] for record in found] == [[2, 3], [0, 3]]
