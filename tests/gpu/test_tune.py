"""On a GPU: what tuning a model chooses is what its steps then use."""

import pytest
import torch
from torch import nn

from semisparse import SparseConfig, _tune, native, sparsify, tuning
from semisparse.gemm import dispatch
from semisparse.gemm.autotune.autotuner import Autotuner
from semisparse.gemm.engine import engine
from semisparse.gemm.problem import Problem
from semisparse.gemm.weight_gradient import WeightGradient
from semisparse.ops import prepare
from semisparse.planning import wanted

pytestmark = pytest.mark.gpu

CONFIGS = [
    SparseConfig(grad_output="mvue"),
    SparseConfig(precision="fp8", grad_output="mvue"),
    SparseConfig(precision="fp8"),
    SparseConfig(weight="row"),
    SparseConfig(repack=True),
    SparseConfig(weight=None, activation="transposable"),
]


@pytest.mark.parametrize("autocast", [False, True], ids=["bf16", "autocast"])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.filterwarnings("ignore::semisparse.TokenMixingWarning")
def test_after_tuning_a_step_measures_nothing_and_meets_exactly_what_was_tuned(
    config: SparseConfig, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuner = Autotuner(engine(), None, shipped=tuple, seconds=0.1)
    native.forget_products()  # of the process's autotuner, which C++ would follow
    for module in (dispatch, prepare, _tune, wanted, tuning):
        monkeypatch.setattr(module, "autotuner", lambda: tuner)
    stored = torch.float32 if autocast else torch.bfloat16
    model = nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 128, bias=False)).to("cuda", stored)
    sparsify(model, config, select=lambda name, layer: True)
    x = torch.randn(1000, 128, device="cuda", dtype=stored, requires_grad=True)
    met: set[Problem | WeightGradient] = set()
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        report = tuning.tune(model, x)
        expected, without = wanted.wanted_by(model, (x,), {})
        known = len(tuner.choices())
        with dispatch.observed(lambda problem, algorithm, choice: met.add(problem.bucket)):
            model(x).float().sum().backward()
    native.forget_products()
    asked = {one.problem.bucket for one in expected.values()}
    # Where a weight gradient in fp8 is not sampled, the sample's product does not run; where it is, only that is told.
    untold = {one for one in asked - met if isinstance(one, WeightGradient) or one.token_axis == "reduction"}
    assert asked - met == (untold if config.precision and config.grad_output else set())
    assert met <= asked
    assert (len(report), without, known) == (len(expected), {}, len(tuner.choices()))
    assert {row.outcome for row in report} == {"tuned"}
