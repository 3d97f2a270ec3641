"""Models with fp8 layers: swap, report, check, back again, packing per step, schedules, recipes and metrics."""

import copy
import logging

import pytest
import torch
from torch import nn

from semisparse import (
    MaskMetrics,
    PackedWeights,
    Phase,
    SemiSparseLinear,
    SparseConfig,
    SparseSchedule,
    check,
    densify,
    recipes,
    reuse_packed,
    routes,
    sparsify,
)
from semisparse.errors import ConfigError
from semisparse.recipes import RecipeSchedule
from semisparse.testing import assert_bit_equal

FP8 = SparseConfig(precision="fp8")
DENSE = SparseConfig(weight=None, precision="fp8")


def network() -> nn.Sequential:
    """A sparse and a dense fp8 layer, and two whose sizes do not fit."""
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 48), nn.Linear(48, 64), nn.Linear(64, 32))
    sparsify(model, {"0": FP8, "2": FP8, "3": DENSE, "4": DENSE})
    return model


def test_the_report_says_which_layers_cannot_run_in_fp8() -> None:
    model = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 48), nn.Linear(48, 36), nn.Linear(36, 32))
    report = sparsify(model, {"0": FP8, "1": FP8, "2": FP8, "3": DENSE})
    reasons = [row.reason for row in report]
    assert reasons[0] == ""
    assert reasons[1] == "not in fp8: N x K = 48 x 96, and fp8 needs multiples of 32"
    assert reasons[2].startswith("not in fp8: ")
    assert "always masked dense" in reasons[2]
    assert reasons[3] == "not in fp8: N x K = 32 x 36, and fp8 needs multiples of 32"
    assert "weight=transposable precision=fp8" in str(report)
    assert [type(layer) for layer in model] == [SemiSparseLinear] * 4


def test_check_says_what_ran() -> None:
    model = network()
    report = check(model, torch.randn(8, 64))
    assert report.ok
    emulated = "emulated: the weight is on cpu"
    assert [row.forward for row in report] == [
        f"packed fp8, {emulated}",
        "masked dense: the weight is on cpu, and sparse products need CUDA; "
        "not in fp8: N x K = 48 x 96, and fp8 needs multiples of 32",
        "dense; not in fp8: N x K = 64 x 48, and fp8 needs multiples of 32",
        f"dense fp8, {emulated}",
    ]
    for layer in model:
        layer.sparse_enabled = False
    report = check(model, torch.randn(8, 64))
    assert [row.forward.partition(";")[0] for row in report] == [
        f"dense fp8 (dense phase), {emulated}",
        "dense (dense phase)",
        "dense",
        f"dense fp8, {emulated}",
    ]


def test_gpus_below_capability_8_9_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnCuda:
        shape, is_cuda, device = torch.Size([64, 32]), True, torch.device("cuda:0")

        def get_device(self) -> int:
            return 0

    for capability, reason in (((8, 0), "the GPU has capability 8.0, and fp8 needs 8.9"), ((8, 9), ""), ((9, 0), "")):
        monkeypatch.setattr(routes, "_capability", lambda index, found=capability: found)
        assert routes.why_not_fp8(OnCuda(), torch.bfloat16) == reason  # type: ignore[arg-type]
        assert routes.takes_fp8(OnCuda(), torch.bfloat16, "row", "auto") is not bool(reason)  # type: ignore[arg-type]


def test_densify_gives_back_the_weights() -> None:
    model = network()
    before = [layer.weight.detach().clone() for layer in model if isinstance(layer, SemiSparseLinear)]
    pruned = [layer.pruned_weight().clone() for layer in model if isinstance(layer, SemiSparseLinear)]
    assert [torch.equal(*pair) for pair in zip(before, pruned, strict=True)] == [False, False, True, True]
    masked = copy.deepcopy(model)
    densify(model)
    report = densify(masked, "masked")
    assert [row.reason for row in report][2:] == ["no weight was pruned, dense weight kept"] * 2
    for dense, wanted in ((model, before), (masked, pruned)):
        layers = [layer for layer in dense if isinstance(layer, nn.Linear)]
        assert [type(layer) for layer in layers] == [nn.Linear] * 4
        for layer, weight in zip(layers, wanted, strict=True):
            assert_bit_equal(layer.weight.detach(), weight)


def test_copies_keep_the_settings_and_compute_the_same() -> None:
    model, x = network(), torch.randn(8, 64)
    assert_bit_equal(copy.deepcopy(model)(x), model(x))
    assert copy.deepcopy(model)[0].sparse_config == FP8


def test_weights_in_fp8_are_packed_between_forwards_and_others_for_16_bits(packed_on_cpu) -> None:
    model, x = network().to(torch.bfloat16), torch.randn(8, 64, dtype=torch.bfloat16)
    expected = model(x)
    weights = PackedWeights(model)
    assert weights.pack() == 2 and not weights.fallbacks
    assert_bit_equal(model(x), expected)
    with reuse_packed(model) as layers:
        assert layers == 2
        assert_bit_equal(model(x), expected)


@pytest.mark.parametrize("pack", ["each_forward", "per_step"])
def test_a_schedule_trains_sparse_and_then_dense_in_fp8(pack) -> None:
    model = network()
    schedule = SparseSchedule(model, [Phase("sparse", 2), Phase("dense", 2)], pack=pack)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    seen = []
    for _ in range(4):
        before = [p.detach().clone() for p in model.parameters()]
        seen.append(check(model, torch.randn(8, 64)).rows[0].forward.partition(",")[0])
        model(torch.randn(8, 64)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert schedule.step()
        assert not any(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))
    assert seen == ["packed fp8", "packed fp8", "dense fp8 (dense phase)", "dense fp8 (dense phase)"]


@pytest.mark.parametrize(
    "make",
    [
        recipes.dinov2,
        recipes.sr_ste,
        recipes.step,
        lambda **how: recipes.fst(grad_output=None, **how),
        lambda precision=None: recipes.fastest() if precision else recipes.safest(),
    ],
)
def test_recipes_run_in_fp8_and_leave_dense_layers_alone(make, caplog) -> None:
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64), nn.Linear(64, 32))
    recipe = make(precision="fp8")
    plain = make()
    sparsify(model, {"0": recipe.config, "2": plain.config, "3": DENSE})
    optimizer = recipes.StepAdamW(model.parameters(), lr=1e-3)
    with caplog.at_level(logging.WARNING):
        schedule = RecipeSchedule(recipe, model, optimizer, 4)
    assert "1 layers (2, ...) were swapped with another grad_output or precision" in caplog.text
    for _ in range(4):
        model(torch.randn(8, 64)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert schedule.step()
    assert check(model, torch.randn(8, 64)).ok


def test_recipes_without_a_form_in_fp8_say_so() -> None:
    assert recipes.fst(precision="fp8").config.products["grad_weight"] == "sparse fp8"
    with pytest.raises(ConfigError, match=r"config\.weight=None: recipes prune weights"):
        recipes.Recipe(name="dense", config=DENSE)


def test_metrics_follow_the_layers_with_masks() -> None:
    model = network()
    metrics = MaskMetrics(model, interval=2)
    for _ in range(2):
        metrics.update()
    assert {name for name in metrics.read() if name.startswith("flip_rate/")} == {"flip_rate/0", "flip_rate/2"}
