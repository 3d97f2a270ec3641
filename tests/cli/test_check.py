"""`semisparse check`: the table, JSON, and exit codes."""

import json
from pathlib import Path

import pytest
import safetensors.torch
from torch import nn

from semisparse import SparseConfig, densify, sparsify
from semisparse.checkpoint import check_checkpoint
from semisparse.cli.check import NOT_SPARSE
from semisparse.cli.common import WRONG_INPUT
from tests.cli.shell import semisparse


@pytest.fixture
def path(tmp_path: Path) -> Path:
    model = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 8))
    sparsify(model, {"0": SparseConfig(), "1": SparseConfig(weight="row")})
    densify(model, weights="masked")
    safetensors.torch.save_file(model.state_dict(), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def test_a_model_that_was_finished_masked_is_proven_layer_by_layer(path: Path) -> None:
    outcome = semisparse("check", path)
    assert (outcome.code, outcome.err) == (0, "")
    lines = {line.split()[0]: line.split() for line in outcome.out.splitlines() if line.split()}
    assert lines["0.weight"][5:8] == ["both", "100", "%"]
    assert lines["1.weight"][5:8] == ["columns", "100", "%"]
    assert lines["2.weight"][5] == "none"
    assert outcome.out.splitlines()[-1] == check_checkpoint(path).summary


def test_json_has_the_same_figures(path: Path) -> None:
    outcome = semisparse("check", path, "--json", "--require", "0.*")
    found = json.loads(outcome.out)
    assert [weight["axis"] for weight in found["weights"]] == ["both", "columns", "none"]
    assert [weight["zeros"] for weight in found["weights"]] == [w.zeros for w in check_checkpoint(path)]
    assert (found["others"], found["failed"], outcome.code) == (3, [], 0)


def test_a_required_weight_that_is_dense_ends_the_command_with_1(path: Path) -> None:
    outcome = semisparse("check", path, "--require", "*.weight", "--require", "1.*")
    assert outcome.code == NOT_SPARSE
    assert outcome.err == "not 2:4 along columns: 2.weight\n"
    assert semisparse("check", path, "--require", "[01].weight").code == 0


def test_wrong_input_ends_with_one_line(path: Path) -> None:
    missing = semisparse("check", path.with_name("other.safetensors"))
    assert missing.code == WRONG_INPUT
    assert missing.err.count("\n") == 1
    assert "other.safetensors" in missing.err
    pattern = semisparse("check", path, "--require", "blocks.*")
    assert pattern.code == WRONG_INPUT
    assert "--require='blocks.*' fits no matrix" in pattern.err
