from pathlib import Path

import pytest
import torch

from semisparse.planning import store
from semisparse.planning.problems import LinearProblem
from semisparse.planning.store import PlanStore, machine
from tests.planning.simulated import measurement

FOUND = measurement(LinearProblem(64, 32, 32))


def test_a_file_that_holds_another_key_than_its_name_says_is_ignored_and_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plans = PlanStore(tmp_path)
    plans.save({"problem": 1}, FOUND)
    assert plans.load({"problem": 1}) == FOUND
    plans._path({"problem": 1}).rename(plans._path({"problem": 2}))
    assert plans.load({"problem": 2}) is None
    assert "another schema or key" in caplog.text


@pytest.mark.parametrize("version", ["570.1", None])
def test_the_machine_names_the_driver(version: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "driver_version", lambda: version)
    assert machine(torch.device("cpu"))["driver"] == (version or "none")
