"""`semisparse plan`: measured here with a GPU, what is known of others without one."""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from semisparse.cli import plan as command
from semisparse.cli.common import WRONG_INPUT
from semisparse.planning import known
from semisparse.planning.candidates import as_candidates
from semisparse.planning.problems import LinearProblem
from tests.cli.shell import semisparse
from tests.planning.simulated import measurer
from tests.surgery.models import Network


def layer(gpu: str, mode: str, *mkn: int) -> known.KnownLayer:
    return known.KnownLayer(gpu, "2.11.0", "today", mode, mkn, {"dense": 3.0, "2:4": 2.0})  # type: ignore[arg-type]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer on one GPU, two modes; another GPU has none."""
    layers = (
        layer("GPU A", "eager", 100, 64, 32),
        layer("GPU A", "graph", 200, 64, 32),
        layer("GPU B", "eager", 1, 4, 4),
    )
    monkeypatch.setattr(known, "known_layers", lambda: layers)


def test_without_a_gpu_it_prints_what_we_measured_and_labels_what_others_did(measured: None) -> None:
    outcome = semisparse("plan", "--shapes", "128,64,32", "4096,768,64")
    assert (outcome.code, outcome.err) == (0, "")
    lines = outcome.out.splitlines()
    assert lines[0] == "No CUDA GPU here: nothing was measured, and this is no plan."
    start = lines.index(
        "GPU A, measured by us: mode eager, torch 2.11.0, forward + backward of a bf16 layer with bias;"
    )
    assert lines[start + 3].split() == ["128", "x", "64", "x", "32", "100", "3.000", "1.50"]
    assert lines[start + 4].split()[5:] == ["not", "measured"]
    start = next(number for number, line in enumerate(lines) if line.startswith("GPU B, measured by us"))
    assert [line.split()[5:] for line in lines[start + 3 : start + 5]] == [["not", "measured"]] * 2
    assert any("not run by us" in line for line in lines)
    assert all(any(line.strip().startswith(one.gpu) for line in lines) for one in known.PUBLISHED)
    assert "SlideSparse repository" in outcome.out
    assert max(map(len, lines)) <= 120


def test_json_without_a_gpu(measured: None) -> None:
    content = json.loads(semisparse("plan", "--shapes", "128,64,32", "--json", "--mode", "graph").out)
    assert (content["gpu"], content["source"]) == (None, known.SOURCE)
    found = {one["gpu"]: one["measured"] for one in content["layers"]}
    assert found["GPU A"]["mkn"] == [200, 64, 32] and found["GPU B"] is None
    assert len(content["published"]) == len(known.PUBLISHED)


def test_the_layers_that_ship_can_be_read_and_are_of_both_gpus() -> None:
    layers = known.known_layers()
    assert {one.gpu for one in layers} == {"NVIDIA H100 80GB HBM3", "NVIDIA H200"}
    assert all(min(one.ms.values()) > 0 and len(one.ms) > 1 and one.ms["dense"] for one in layers)


def test_a_known_layer_serves_up_to_twice_or_half_its_tokens() -> None:
    layers = [layer("G", "eager", m, 64, 32) for m in (100, 400)]
    for tokens, m in ((49, None), (50, 100), (190, 100), (210, 400), (800, 400), (801, None)):
        found = known.near(LinearProblem(tokens, 64, 32), "G", "eager", layers)
        assert (None if found is None else found.mkn[0]) == m
    assert known.near(LinearProblem(100, 32, 64), "G", "eager", layers) is None
    assert known.near(LinearProblem(100, 64, 32), "G", "graph", layers) is None


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU whose times are made up."""

    def measured(uses: Any, mode: Any, packing: Any, candidates: Any, seconds: Any) -> Any:
        from semisparse._plan import planned

        return planned(uses, measurer(candidates=as_candidates(candidates), mode=mode, packing=packing))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("semisparse.planning.files.here", dict)
    monkeypatch.setattr(command, "_measured", measured)


def test_packing_per_step_and_accumulation_go_into_the_plan(gpu: None) -> None:
    shape = ("--shapes", "16,64,64", "--json")
    content = json.loads(semisparse("plan", *shape, "--pack", "per_step", "--accumulation", "4").out)
    assert content["packing"] == {"pack": "per_step", "accumulation": 4}
    assert semisparse("plan", *shape, "--pack", "never").code == WRONG_INPUT
    assert semisparse("plan", *shape, "--accumulation", "0").code == WRONG_INPUT


def test_without_a_gpu_it_says_that_other_packing_was_not_measured(measured: None) -> None:
    out = semisparse("plan", "--shapes", "128,64,32", "--accumulation", "4").out
    assert "measured with packing at each forward, for one micro-batch" in out


def test_with_a_gpu_it_measures_and_chooses(gpu: None, tmp_path: Path) -> None:
    shapes = ("--shapes", "16,64,64", "16,32,32")
    outcome = semisparse("plan", *shapes, "--save", tmp_path / "plan.json")
    assert outcome.code == 0
    (line,) = [line for line in outcome.out.splitlines() if line.strip().startswith("16 x 64 x 64")]
    assert line.split()[-3:] == ["fp8", "+", "2:4"]
    assert "2 of 2 linear layers are swapped." in outcome.out
    saved = json.loads((tmp_path / "plan.json").read_text())
    assert json.loads(semisparse("plan", *shapes, "--json").out) == saved
    only = json.loads(semisparse("plan", *shapes, "--json", "--candidates", "2:4").out)
    assert list(only["candidates"]) == ["2:4"] and {row["choice"] for row in only["rows"]} == {"2:4"}


@pytest.fixture
def timm(monkeypatch: pytest.MonkeyPatch) -> None:
    def create_model(name: str) -> nn.Module:
        model: Any = nn.Sequential(nn.Flatten(2), Network())
        model.pretrained_cfg = {"input_size": (5, 2, 4)}
        return model

    module: Any = ModuleType("timm")
    module.create_model, module.__version__ = create_model, "1"
    module.is_model = lambda name: name == "vit"
    module.list_models = lambda: ["vit_tiny"]
    monkeypatch.setitem(sys.modules, "timm", module)


def test_a_model_of_timm_is_looked_at_on_meta(timm: None, gpu: None) -> None:
    content = json.loads(semisparse("plan", "--timm", "vit", "--batch", 3, "--json", "--candidates", "2:4").out)
    rows = {row["name"]: row for row in content["rows"]}
    assert rows["1.blocks.0.attn.qkv"]["calls"][0]["problem"]["tokens"] == 3 * 5
    assert "multiples of 4" in rows["1.head"]["why"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "name either layers, as in --shapes="),
        (("--shapes", "1,2,3", "--timm", "vit"), "name either layers"),
        (("--shapes", "1,2"), "--shapes='1,2' is not M,K,N"),
        (("--shapes", "1,2,-3"), "is not M,K,N"),
        (("--shapes", "a,b,c"), "is not M,K,N"),
        (("--shapes", "64,64,64", "--mode", "fast"), "--mode='fast' is not one of"),
        (("--shapes", "64,64,64", "--seconds", "-1"), "--seconds=-1.0 must be a positive number"),
        (("--shapes", "64,64,64", "--seconds", "nan"), "--seconds=nan must be a positive number"),
        (("--shapes", "64,64,64", "--candidates", "3:4"), "'3:4' is not one of 'dense fp8'"),
        (("--timm", "resmet"), "--timm='resmet' is no model of timm 1; closest: vit_tiny"),
        (("--timm", "vit", "--batch", 0), "--batch=0 must be positive"),
        (("--shapes", "64,64,64", "--save", "plan.json"), "there is no CUDA GPU here, so there is no plan to keep"),
    ],
    ids=str,
)
def test_wrong_input_ends_with_one_line(arguments: tuple[Any, ...], said: str, timm: None) -> None:
    outcome = semisparse("plan", *arguments)
    assert (outcome.code, outcome.err.count("\n")) == (WRONG_INPUT, 1)
    assert said in outcome.err


def test_without_timm_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    outcome = semisparse("plan", "--timm", "vit")
    assert outcome.code == WRONG_INPUT and "pip install timm" in outcome.err


def test_a_plan_that_cannot_be_saved_is_not_measured_or_else_printed_first(
    gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for save in (tmp_path / "no folder" / "plan.json", tmp_path):
        outcome = semisparse("plan", "--shapes", "16,64,64", "--save", save)
        assert (outcome.code, outcome.out) == (WRONG_INPUT, "")
        assert "cannot be written: name a file in a folder that exists" in outcome.err

    def full(self: object, path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("semisparse.Plan.save", full)
    outcome = semisparse("plan", "--shapes", "16,64,64", "--save", tmp_path / "plan.json")
    assert outcome.code == WRONG_INPUT and "1 of 1 linear layers are swapped." in outcome.out
    assert outcome.err.startswith("error: --save=") and "cannot be written: Permission denied" in outcome.err
