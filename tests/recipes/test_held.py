"""Frozen masks and scales on the layers: what is computed, shared, followed, saved and written."""

import copy
import pickle

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import nn

from semisparse import MaskMetrics, Phase, SparseConfig, SparseSchedule, densify, sparsify
from semisparse.errors import ConfigError
from semisparse.recipes import Recipe, RecipeSchedule, fst, s_ste
from semisparse.testing import assert_bit_equal
from tests.recipes.training import DECAY, SPARSE, Run, assert_same, by_hand, kept, row_mask, scale_by_hand, shrunk
from tests.support import held_by


def held_run(steps: int = 5, every: int = 100) -> tuple[Run, dict[str, torch.Tensor]]:
    """A run whose masks are old, and those masks by brute force."""
    run = Run(fst(decay=DECAY, refresh_every=every))
    masks = {name: by_hand(run.layer(name).weight, "transposable") for name in SPARSE}
    run.steps(0, steps)
    for name in SPARSE:
        assert not torch.equal(by_hand(run.layer(name).weight, "transposable"), masks[name])
    return run, masks


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_held_masks_of_every_dtype(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(8, 12, dtype=dtype))
    sparsify(model, fst().config)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    mask = by_hand(model[0].weight, "transposable")
    RecipeSchedule(fst(), model, optimizer, 10)
    with torch.no_grad():
        model[0].weight.normal_()
    assert_bit_equal(model[0].pruned_weight(), kept(model[0].weight, mask))
    x = torch.randn(3, 8, dtype=dtype)
    assert_bit_equal(model(x), F.linear(x, kept(model[0].weight, mask), model[0].bias))


def test_densify_masked_writes_what_the_held_mask_keeps() -> None:
    run, masks = held_run()
    x = torch.randn(5, 8)
    wanted = {name: kept(run.layer(name).weight, masks[name]).clone() for name in SPARSE}
    before = run.model(x)
    densify(run.model, weights="masked")
    for name in SPARSE:
        assert type(run.layer(name)) is nn.Linear and held_by(run.layer(name)) is None
        assert_bit_equal(run.layer(name).weight.detach(), wanted[name])
    assert_bit_equal(run.model(x), before)
    run.schedule.finish()


def test_densify_dense_keeps_the_master_weight() -> None:
    run, _ = held_run()
    weights = {name: run.layer(name).weight.detach().clone() for name in SPARSE}
    densify(run.model)
    for name in SPARSE:
        assert_bit_equal(run.layer(name).weight.detach(), weights[name])


def test_densify_masked_writes_the_soft_weight() -> None:
    run = Run(s_ste())
    scales = {name: scale_by_hand(run.layer(name).weight).float() for name in SPARSE}
    run.steps(0, 5)
    wanted = {name: shrunk(run.layer(name).weight).float() * scales[name] for name in SPARSE}
    x = torch.randn(5, 8)
    before = run.model(x)
    densify(run.model, weights="masked")
    run.schedule.finish()
    for name in SPARSE:
        assert_bit_equal(run.layer(name).weight.detach(), wanted[name])
        assert (run.layer(name).weight.detach().view(-1, 4) != 0).sum(1).max() <= 2
    assert_bit_equal(run.model(x), before)


def test_scales_stay_as_they_were_at_the_start() -> None:
    run = Run(s_ste())
    scales = {name: scale_by_hand(run.layer(name).weight).float() for name in SPARSE}
    run.steps(0, 12)
    for name in SPARSE:
        assert_bit_equal(run.schedule.state_dict()["scales"][name], scales[name])
        assert scale_by_hand(run.layer(name).weight).float() != scales[name]


def test_a_soft_layer_without_its_scale_says_so() -> None:
    run = Run(s_ste())
    run.schedule.finish()
    with pytest.raises(ConfigError, match="start its recipe"):
        run.model(torch.randn(2, 8))


@pytest.mark.parametrize("mask", ["masks", "scales"])
def test_layers_that_share_a_weight_share_what_is_frozen_of_it(mask: str) -> None:
    recipe = fst(refresh_every=2) if mask == "masks" else s_ste()
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    sparsify(model, recipe.config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    schedule = RecipeSchedule(recipe, model, optimizer, 20)
    assert held_by(model[0]) is held_by(model[1])
    assert list(schedule.state_dict()[mask]) == ["0"]
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 8)).square().sum().backward()
        optimizer.step()
        schedule.step()
    assert_bit_equal(model[0].pruned_weight(), model[1].pruned_weight())
    schedule.finish()
    assert all(held_by(layer) is None for layer in model)


def test_a_refresh_keeps_the_address() -> None:
    run = Run(fst(refresh_every=2))
    tensors = {name: held_by(run.layer(name)) for name in SPARSE}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    run.steps(0, 4)
    for name, tensor in tensors.items():
        assert held_by(run.layer(name)) is tensor
        assert not torch.equal(tensor, before[name])


def test_masks_are_chosen_anew_when_a_sparse_phase_begins_even_after_one_step() -> None:
    run = Run(Recipe(name="mine", refresh_every=10, dense_range=(0.0, 0.05)))
    run.steps(0, 1)
    assert run.schedule.phase == "sparse"
    masks = {name: by_hand(run.layer(name).weight, "transposable") for name in SPARSE}
    run.steps(1, 5)
    for name in SPARSE:
        assert_bit_equal(run.layer(name).pruned_weight(), kept(run.layer(name).weight, masks[name]))


def test_nothing_is_chosen_in_a_dense_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(fst(refresh_every=2))
    run.steps(0, 20)
    state = run.schedule.state_dict()
    monkeypatch.setattr("semisparse.ops.tile_codes", lambda *_: pytest.fail("a mask was chosen"))
    run.steps(20, 24)
    after = run.schedule.state_dict()
    assert after["age"] == state["age"]
    assert_same(after["masks"], state["masks"])


def test_a_compiled_model_sees_refreshed_masks_without_compiling_again() -> None:
    torch._dynamo.reset()
    run = Run(fst(refresh_every=2))
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(run.model, backend=counter)
    x = torch.randn(6, 8)
    for number in range(6):
        torch.testing.assert_close(compiled(x), run.model(x))
        run.steps(number, number + 1)
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_copies_and_pickles_of_the_model_keep_the_masks_of_that_moment() -> None:
    run, _ = held_run()
    x = torch.randn(4, 8)
    before = run.model(x)
    others = copy.deepcopy(run.model), pickle.loads(pickle.dumps(run.model))
    for other in others:
        assert_bit_equal(other(x), before)
    run.steps(5, 8)
    for other in others:
        assert_bit_equal(other(x), before)


def test_held_masks_survive_a_change_of_dtype() -> None:
    run, masks = held_run()
    run.model.to(torch.float64)
    for name in SPARSE:
        assert_bit_equal(run.layer(name).pruned_weight(), kept(run.layer(name).weight, masks[name]))


@pytest.mark.parametrize("every", [4, 100])
def test_the_flip_rate_is_of_the_masks_that_the_weights_would_choose(every: int) -> None:
    """Whatever is held, so that rates of all recipes compare; the phase is that of the schedule."""
    run = Run(fst(decay=DECAY, refresh_every=every))
    followed = MaskMetrics(run.model, 2)
    for number in range(24):
        before = {name: by_hand(run.layer(name).weight, "transposable") for name in SPARSE}
        run.steps(number, number + 1)
        if followed.update():
            values = followed.read()
            flips = total = 0
            for name in SPARSE:
                mask = by_hand(run.layer(name).weight, "transposable")
                changed = (mask ^ before[name]).sum().item()
                assert values[f"flip_rate/{name}"] == pytest.approx(changed / mask.numel())
                weight = run.layer(name).weight.detach().double().abs()
                assert values[f"kept_magnitude/{name}"] == pytest.approx((weight[mask].sum() / weight.sum()).item())
                flips, total = flips + changed, total + mask.numel()
            assert values["flip_rate"] == pytest.approx(flips / total)
            assert values["phase"] == (1 if number + 1 < 20 else 0)


def test_the_flip_rate_of_a_soft_mask_is_that_of_its_rows() -> None:
    run = Run(s_ste())
    followed = MaskMetrics(run.model, 2)
    run.steps(0, 1)
    followed.update()
    before = row_mask(run.layer("0").weight)
    run.steps(1, 2)
    followed.update()
    changed = (before ^ row_mask(run.layer("0").weight)).float().mean().item()
    assert changed > 0 and followed.read()["flip_rate/0"] == pytest.approx(changed)


def test_the_flip_ratio_to_a_dense_run_of_the_same_recipe() -> None:
    reads = []
    for fraction in (0.0, 1.0):
        run = Run(fst(decay=DECAY, refresh_every=3, sparse_fraction=fraction))
        followed = MaskMetrics(run.model, 2)
        for number in range(2):
            run.steps(number, number + 1)
            followed.update()
        reads.append(followed)
    dense, sparse = reads[0].read(), reads[1].read(reads[0].read())
    assert (dense["phase"], sparse["phase"]) == (0, 1)
    for name in SPARSE:
        assert dense[f"flip_rate/{name}"] > 0
        quotient = sparse[f"flip_rate/{name}"] / dense[f"flip_rate/{name}"]
        assert sparse[f"flip_ratio/{name}"] == pytest.approx(quotient)


def test_a_plain_schedule_beside_frozen_masks_is_untouched() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    sparsify(model, SparseConfig())
    SparseSchedule(model, [Phase("sparse", 3)]).step()
    assert held_by(model[0]) is None
