"""semisparse.plan: from a model to a plan that is printed, saved, loaded and applied."""

import json
from pathlib import Path
from typing import Any
from unicodedata import east_asian_width

import pytest
import torch
from torch import nn

import semisparse
from semisparse import Plan, SparseConfig, _plan, sparsify
from semisparse._plan import planned, uses_of
from semisparse.documents import without_checksum
from semisparse.errors import ConfigError, NoLayerMatchedError, PlanError
from semisparse.nn import SemiSparseLinear
from semisparse.planning import files
from semisparse.planning.packing import Packing
from semisparse.planning.text import WIDTH
from semisparse.planning.timing import Times
from semisparse.planning.trial import Tried
from tests.planning.simulated import PACK_MS, SHARES, SimulatedTimer, dense_ms, measurer


class Model(nn.Module):
    """Blocks that are alike, a layer that is never called, and a head."""

    def __init__(self, blocks: int = 3, width: int = 32) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"wide_projection_of_this_block": nn.Linear(width, 64), "out": nn.Linear(64, width)})
            for _ in range(blocks)
        )
        self.unused, self.head = nn.Linear(width, 32), nn.Linear(width, 8)
        self.to(torch.bfloat16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block["out"](block["wide_projection_of_this_block"](x).relu())
        return self.head(x)


def made(
    model: nn.Module | None = None, step: Times | None = None, timer: SimulatedTimer | None = None, **how: Any
) -> Plan:
    model = Model() if model is None else model
    x = torch.ones(16, 32, dtype=torch.bfloat16)
    return planned(uses_of(model, (x,), {}, None), measurer(timer, **how), step)


def test_a_plan_says_per_layer_what_is_chosen_or_why_it_stays_dense() -> None:
    model, timer = Model(), SimulatedTimer()
    plan = made(model, timer=timer)
    assert len(timer.seen) == len(set(timer.seen)) == 3, "the first layer's input needs no gradient"
    assert list(plan.configs) == [f"blocks.{i}.{name}" for i in range(3) for name in model.blocks[0]]
    assert set(plan.configs.values()) == {SparseConfig(precision="fp8")}
    assert plan.dense["unused"] == "never called in this forward" and "output head" in plan.dense["head"]
    saved = sum(dense_ms(problem) for row in plan if row.config for problem, _ in row.calls) * (1 - SHARES["fp8 + 2:4"])
    assert plan.saving_ms == saved
    assert plan.predicted_ms is None


def test_where_nothing_gains_every_layer_says_so_and_nothing_is_swapped() -> None:
    model = Model()
    plan = made(model, timer=SimulatedTimer({"dense": 1.0, "2:4": 1.5, "dense fp8": 1.25}))
    assert plan.configs == {}
    assert plan.dense["blocks.0.out"] == "the fastest, dense fp8, takes 1.25 of dense's time"
    report = plan.apply(model)
    assert report.swapped == () and report.skipped["blocks.0.out"] == plan.dense["blocks.0.out"]
    assert type(model.blocks[0]["out"]) is nn.Linear


def test_a_plan_without_a_measured_layer_gives_no_sums() -> None:
    clock = iter(range(0, 10000, 100))
    text = str(made(seconds=0.5, clock=clock.__next__))
    assert "No linear layer was measured." in text and "ms planned" not in text
    assert "not measured: the budget of 0.5 s was spent" in text


def test_a_known_step_is_predicted_and_the_host_is_weighed() -> None:
    plan = made(step=Times(200.0))
    assert plan.predicted_ms == 200.0 - plan.saving_ms
    bound = made(
        step=Times(200.0, None, 200.0), timer=SimulatedTimer(host={"2:4": 1.0, "fp8 + 2:4": 2.0, "dense": 0.5})
    )
    assert bound.predicted_ms is not None and bound.predicted_ms <= 200.0
    assert all(row.choice not in ("2:4", "fp8 + 2:4") for row in bound)
    could = sum(min(times.on_device for times in row.times.values()) for row in bound if row.times)
    text = " ".join(str(bound).split())
    assert f"the layers could then take {could:.2f} ms" in text and 'Plan with mode="compiled"' in text
    assert "could then take" not in str(plan), "the host is not known to bound this step"


def test_packing_and_accumulation_are_part_of_the_plan_and_of_the_predicted_step(tmp_path: Path) -> None:
    one, per_step = made(candidates="fp8 + 2:4", step=Times(500.0)), Packing("per_step", 4)
    plan = made(candidates="fp8 + 2:4", step=Times(500.0), packing=per_step)
    swapped, apart = len(plan.configs), PACK_MS / 8
    assert swapped == len(one.configs) == 6
    assert plan.saving_ms == 4 * one.saving_ms - swapped * apart
    assert plan.predicted_ms == 500.0 - plan.saving_ms
    assert "Weights are packed once per step, all together; 4 micro-batches per step." in str(plan).splitlines()
    assert "Weights are packed at each forward." in str(one).splitlines()
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan


def test_its_text_fits_80_columns_and_joins_layers_that_are_alike() -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a_module_with_quite_a_long_name = nn.ModuleDict({"and_another_long_one": Model()})

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a_module_with_quite_a_long_name["and_another_long_one"](x)

    plan = made(Deep(), step=Times(200.0), timer=SimulatedTimer({"dense": 1.0, "2:4 + mvue": 0.5}))
    lines = str(plan).splitlines()
    assert max(map(len, lines)) <= WIDTH == 80
    (line,) = [line for line in lines if "blocks.*.out (3)" in line and "16x64x32" in line]
    assert line.split()[-1] == "mvue"
    assert any(line.startswith("Step: 200.00 ms dense") for line in lines)
    assert "never called in this forward" in " ".join(str(plan).split())
    assert "6 of 8 linear layers are swapped." in lines


def test_the_plan_is_applied_and_other_layers_stay_dense() -> None:
    model, other = Model(), Model()
    plan = made(model)
    assert plan.apply(model).configs == plan.configs
    assert sparsify(other, plan.configs).configs == plan.configs
    assert isinstance(model.blocks[1]["out"], SemiSparseLinear) and type(model.head) is nn.Linear


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (Model(blocks=2), "blocks.2.out: the model has no linear layer of this name"),
        (Model(blocks=4), "blocks.3.out: it was not planned"),
        (Model(width=64), "unused: N x K is 32 x 64, and 32 x 32 was planned"),
    ],
)
def test_a_plan_of_another_model_names_the_layers_that_differ(model: nn.Module, named: str) -> None:
    with pytest.raises(PlanError) as caught:
        made().apply(model)
    assert named in str(caught.value)
    assert not any(isinstance(module, SemiSparseLinear) for module in model.modules())


def test_a_wrapped_model_is_the_same_model() -> None:
    model = Model()
    compiled = torch.compile(model)
    assert made(model).differences(compiled) == {}
    plan = made(compiled)
    assert [row.name for row in plan] == [row.name for row in made(model)]
    assert sparsify(model, plan.configs).configs == plan.configs


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made(step=Times(200.0, None, 50.0), timer=SimulatedTimer({"dense": 1.0, "2:4": 0.5})).save(tmp_path / "plan.json")
    return tmp_path / "plan.json"


def test_a_saved_plan_comes_back_as_it_was(path: Path, recwarn: pytest.WarningsRecorder) -> None:
    plan = Plan.load(path)
    expected = made(step=Times(200.0, None, 50.0), timer=SimulatedTimer({"dense": 1.0, "2:4": 0.5}))
    assert plan == expected and str(plan) == str(expected)
    assert not recwarn.list


def test_a_plan_from_elsewhere_says_so(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = files.here()
    monkeypatch.setattr(files, "here", lambda: facts | {"GPU": "NVIDIA H100", "new": "1"})
    with pytest.warns(UserWarning, match=r"measured elsewhere: GPU cpu \(here NVIDIA H100\), new none \(here 1\)"):
        Plan.load(path)


@pytest.mark.parametrize(
    "change",
    [
        {"schema": 2},
        {"packing": {"pack": "never", "accumulation": 1}},
        {"packing": {"pack": "per_step", "accumulation": 0.5}},
        {"packing": None},
        {"mode": "fast"},
        {"candidates": {"2:4": {"weight": "3:4"}}},
        {"candidates": {}},
        {"step": {"ms": "long"}},
        {"predicted_ms": "short"},
        {"predicted_ms": 0},
        {"predicted_ms": float("nan")},
        {"step": {"ms": 0.0, "device_ms": None, "host_ms": None, "held_bytes": 0}},
        {"machine": {"GPU": 3}},
        {"rows": [{}]},
        {"rows": 3},
        {"remarks": [3]},
        {"remarks": ["\ud800"]},
        {"step": {"ms": 1e308, "device_ms": None, "host_ms": None, "held_bytes": 0}},
        {"step": {"ms": 1.0, "device_ms": None, "host_ms": None, "held_bytes": 2**64}},
    ],
    ids=str,
)
def test_a_damaged_plan_is_refused(path: Path, change: dict[str, Any]) -> None:
    path.write_text(json.dumps(without_checksum(json.loads(path.read_text())) | change))
    with pytest.raises(PlanError, match="holds no plan that can be used"):
        Plan.load(path)


def test_a_damaged_row_is_refused(path: Path) -> None:
    content = without_checksum(json.loads(path.read_text()))
    row = content["rows"][0]
    for key, value in [("choice", "3:4"), ("times", {}), ("calls", [{"problem": {}, "calls": 1}]), ("in_features", "8"),
                       ("name", 3)]:  # fmt: skip
        path.write_text(json.dumps(content | {"rows": [row | {key: value}]}))
        with pytest.raises(PlanError):
            Plan.load(path)
    path.write_text(json.dumps(content | {"rows": [row, row]}))
    with pytest.raises(PlanError, match="is in it twice"):
        Plan.load(path)
    for text in ("", "[]", "{", "null"):
        path.write_text(text)
        with pytest.raises(PlanError):
            Plan.load(path)
    with pytest.raises(PlanError, match="cannot be read"):
        Plan.load(path.parent)


def test_without_a_gpu_it_says_what_to_do_instead() -> None:
    with pytest.raises(PlanError, match="`semisparse plan` prints"):
        semisparse.plan(Model(), tokens=16)


@pytest.mark.parametrize("device", ["gpu", "cpu", "cuda:1", 3.5])
def test_a_device_that_is_none_of_this_machine_is_refused(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="device="):
        semisparse.plan(Model(), tokens=16, device=device)
    assert _plan._where(Model(), "cuda:0") == torch.device("cuda:0")


def test_wrong_arguments_are_refused_before_anything_runs() -> None:
    model = Model()
    x = torch.ones(16, 32, dtype=torch.bfloat16)
    for wrong in ({"mode": "fast"}, {"candidates": ["3:4"]}, {"seconds": 0}, {"pack": "never"}, {"accumulation": 0},
                  {"seconds": float("nan")}, {"progress": True}, {"candidates": {"a\nb": SparseConfig()}},
                  {"candidates": {"(cast)": SparseConfig()}}):  # fmt: skip
        with pytest.raises(ConfigError):
            semisparse.plan(model, x, **wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="tokens is given, and inputs as well"):
        semisparse.plan(model, x, tokens=16)
    for cache in (None, 0, 1):
        with pytest.raises(ConfigError, match=f"cache={cache} must be True, False or the path of a folder"):
            _plan._store(cache)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="step='fast'"):
        _plan._given("fast")  # type: ignore[arg-type]
    with pytest.raises(NoLayerMatchedError):
        semisparse.plan(model, x, select="quux")
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        semisparse.plan(model, torch.ones(2, 3, dtype=torch.bfloat16))


def test_measuring_leaves_random_numbers_and_the_autocast_of_the_caller_alone() -> None:
    model, before = Model(), torch.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16):
        plan = made(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert plan.configs
    with torch.inference_mode():
        assert made(model).configs == plan.configs


def test_long_and_wide_names_stay_within_80_columns() -> None:
    long, wide = "a setting whose name goes on and on and on, for ever and ever", "設定" * 30
    layers = nn.ModuleDict({"層" * 50: nn.Linear(64, 64), "x" * 90: nn.Linear(64, 64), "短": nn.Linear(64, 32)})
    for name in (long, wide):
        timer, candidates = SimulatedTimer({"dense": 1.0, name: 0.5}), {name: SparseConfig(), "2:4": SparseConfig()}
        plan = planned(uses_of(layers.bfloat16(), (), {}, 2**20), measurer(timer, candidates))
        lines = str(plan).splitlines()
        widths = [sum(2 if east_asian_width(one) in "WF" else 1 for one in line) for line in lines]
        assert max(widths) <= WIDTH and "\0" not in str(plan)
        assert lines[1].endswith(name[-7:]) and lines[3].startswith("短") and lines[1].startswith("..")


def test_a_layer_that_takes_no_time_that_could_be_measured_says_so() -> None:
    """As the difference of two compiled functions may."""
    plan = made(timer=SimulatedTimer({"dense": 0.0, "2:4": 0.0}))
    assert plan.dense["blocks.0.out"] == "it takes too little time to be measured"


def test_one_layer_is_not_one_layers() -> None:
    def attempt(variants: Any) -> Any:
        return 100.0, [Tried(80.0, (0.8,) * 16)] * len(variants)

    told: list[str] = []
    timer = SimulatedTimer({"dense": 1.0, "2:4": 0.5})
    model = nn.Sequential(nn.Linear(64, 64)).bfloat16()
    plan = planned(
        uses_of(model, (), {}, 64), measurer(timer, ["2:4"], progress=told.append), Times(100.0, None, 1.0), attempt
    )
    assert "80.00 ms with 1 layer swapped." in " ".join(str(plan).split())
    assert told[-1] == "trying 1 choice in the whole step"
