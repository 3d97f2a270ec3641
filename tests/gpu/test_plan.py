"""Plans on a GPU: every candidate is measured in every mode, and a second plan measures nothing."""

from pathlib import Path

import pytest
import torch
from torch import nn

import semisparse
from semisparse.planning.candidates import as_candidates, default_candidates
from semisparse.planning.measuring import Measurer
from semisparse.planning.packing import Packing
from semisparse.planning.problems import LinearProblem
from semisparse.planning.timing import Mode

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:The CUDA Graph is empty"),
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS, but there was no current"),
]


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256)).to("cuda", torch.bfloat16)


@pytest.mark.parametrize("mode", ["eager", "graph", "compiled"])
def test_every_candidate_is_measured_and_a_second_plan_is_read_from_disk(mode: Mode, tmp_path: Path) -> None:
    net, x = model(), torch.randn(512, 256, device="cuda", dtype=torch.bfloat16)
    lines: list[str] = []
    plan = semisparse.plan(net, x, mode=mode, cache=tmp_path, progress=lines.append)
    for row in plan:
        assert row.times.keys() == {"dense", *default_candidates()}, row.dropped
        assert all(times.device_ms and times.held_bytes > 0 for times in row.times.values())
        # So small a layer may take less than the noise of the pointwise functions around it.
        assert mode == "compiled" or all(times.ms > 0 for times in row.times.values())
        assert all((times.host_ms is None) == (mode == "graph") for times in row.times.values())
    assert len(lines) == 2
    again = semisparse.plan(net, x, mode=mode, cache=tmp_path, progress=lines.append)
    assert lines[2:] == ["2 of 2 problems were measured before"]
    assert again.rows == plan.rows


@pytest.mark.parametrize("mode", ["eager", "graph", "compiled"])
def test_packing_per_step_is_timed_apart_from_the_calls(mode: Mode) -> None:
    device, problem = torch.device("cuda", torch.cuda.current_device()), LinearProblem(512, 256, 512)
    settings = as_candidates(["dense fp8", "2:4", "2:4 + mvue", "fp8 + 2:4"])
    how = Measurer(settings, mode, device, packing=Packing("per_step", 4))
    found = how.measure([problem])[problem]
    assert not found.dropped
    assert list(found.packs) == ["2:4", "2:4 + mvue", "fp8 + 2:4"]  # a dense layer rounds its weight at each forward
    for times in found.packs.values():
        assert times.ms > 0 and times.device_ms and times.held_bytes >= 256 * 512
    net, x = model(), torch.randn(512, 256, device="cuda", dtype=torch.bfloat16)
    plan = semisparse.plan(net, x, mode=mode, pack="per_step", accumulation=4, candidates="2:4", cache=False)
    assert all(row.times.keys() == {"dense", "2:4"} for row in plan)
    assert "4 micro-batches per step" in str(plan)


def test_a_step_is_timed_and_predicted_and_the_plan_is_applied(tmp_path: Path) -> None:
    net, x = model(), torch.randn(512, 256, device="cuda", dtype=torch.bfloat16)
    plan = semisparse.plan(net, x, step=lambda: net(x).sum().backward(), cache=tmp_path)
    assert plan.step is not None and plan.step.host_ms is not None and plan.predicted_ms is not None
    assert plan.predicted_ms <= max(plan.step.ms, plan.step.host_ms)
    assert plan.apply(net).configs == plan.configs


def test_what_does_not_fit_into_memory_is_dropped_and_said(tmp_path: Path) -> None:
    net = nn.Linear(64, 64, device="meta", dtype=torch.bfloat16)
    plan = semisparse.plan(net, tokens=2**33, candidates="2:4", device="cuda", cache=tmp_path)
    assert plan.dense == {"": "out of memory"}
    assert not list(tmp_path.iterdir())
