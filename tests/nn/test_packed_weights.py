"""PackedWeights: whatever writes the weights, forwards compute what a layer that packs at each forward does."""

import copy
import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from semisparse import PackedWeights, SemiSparseActivationLinear, SemiSparseLinear, SparseConfig, ops
from semisparse.errors import ConfigError
from semisparse.testing import assert_bit_equal, small_integers
from tests.nn.packing import BF16, X, expect_fresh, in_place, model_of, packed, results

pytestmark = pytest.mark.usefixtures("packed_on_cpu")


def stepped(make: Callable[[list[Tensor]], torch.optim.Optimizer]) -> Callable[[nn.Sequential], None]:
    def change(model: nn.Sequential) -> None:
        optimizer = make(list(model.parameters()))
        results(model)
        optimizer.step()

    return change


def averaged(model: nn.Sequential) -> None:
    """Swap the weights with an average, as evaluation does."""
    average = torch.optim.swa_utils.AveragedModel(copy.deepcopy(model))
    with torch.no_grad():
        for ours, theirs in zip(model.parameters(), average.parameters(), strict=True):
            theirs.mul_(-0.5)
            kept = ours.clone()
            ours.copy_(theirs)
            theirs.copy_(kept)


def held_codes(model: nn.Sequential) -> None:
    for seed, layer in enumerate(model):
        layer.hold(codes=ops.tile_codes(small_integers((16, 16), seed=seed), "transposable"))


def replaced(model: nn.Sequential) -> None:
    for layer in model:
        layer.weight = nn.Parameter(torch.randn_like(layer.weight))


def exchanged_data(model: nn.Sequential) -> None:
    for layer in model:
        layer.weight.data = torch.randn_like(layer.weight)


CHANGES: dict[str, Callable[[nn.Sequential], object]] = {
    "foreach AdamW": stepped(lambda p: torch.optim.AdamW(p, lr=0.5, foreach=True)),
    "fused AdamW": stepped(lambda p: torch.optim.AdamW(p, lr=0.5, fused=True)),
    "AdamW by a loop": stepped(lambda p: torch.optim.AdamW(p, lr=0.5, foreach=False)),
    "load_state_dict": lambda model: model.load_state_dict(model_of().state_dict()),
    "load_state_dict(assign=True)": lambda model: model.load_state_dict(model_of().state_dict(), assign=True),
    "copy_": in_place,
    "swap with an average": averaged,
    "other memory behind the Parameter": exchanged_data,
    "a new Parameter": replaced,
    "held codes": held_codes,
    "another mask": lambda model: [setattr(layer, "sparse_config", SparseConfig(weight="row")) for layer in model],
}


@pytest.mark.parametrize("how", CHANGES)
def test_every_kind_of_change_is_seen_by_the_next_forward(how: str) -> None:
    model = model_of()
    weights = packed(model)
    for _ in range(2):
        before = model(X)
        CHANGES[how](model)
        expect_fresh(model)
        assert not torch.equal(model(X), before)
        weights.pack()
        expect_fresh(model)
        with torch.no_grad():
            for layer in model:
                layer.sparse_config, layer.held_codes = SparseConfig(), None
                layer.weight.neg_()
    expect_fresh(model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_model_in_another_dtype_is_packed_for_that(dtype: torch.dtype) -> None:
    model = model_of()
    weights = packed(model)
    model(X)
    model.to(dtype)
    expect_fresh(model, X.to(dtype))
    assert weights.pack() == (3 if dtype is torch.float16 else 0)
    expect_fresh(model, X.to(dtype))


@pytest.mark.parametrize("held", ["codes", "scale"])
def test_what_a_recipe_writes_in_place_is_seen(held: str) -> None:
    model = model_of(2, mask="soft" if held == "scale" else "transposable")
    for layer in model:
        codes = ops.tile_codes(torch.randn(16, 16), "transposable")
        layer.hold(scale=torch.tensor(0.5)) if held == "scale" else layer.hold(codes=codes)
    packed(model)
    before = model(X)
    with torch.no_grad():
        for layer in model:
            if held == "scale":
                layer.held_scale.mul_(2)
            else:
                layer.held_codes.copy_(ops.tile_codes(torch.randn(16, 16), "transposable"))
    assert not torch.equal(model(X), before)
    expect_fresh(model)
    with torch.no_grad():
        model[1].weight.mul_(-1)
    expect_fresh(model)


def test_a_mask_that_needs_a_scale_fails_as_its_forward_does_and_holds_nothing() -> None:
    model = nn.Sequential(model_of(1), model_of(1, mask="soft"))
    weights = PackedWeights(model)
    with pytest.raises(ConfigError, match="start its recipe"):
        weights.pack()
    assert weights.layers == 0 and model[0][0]._packed is None


def test_writes_through_data_are_seen_after_pack() -> None:
    model = nn.Sequential(SemiSparseLinear(16, 16, bias=False, dtype=BF16)).requires_grad_(False)
    weights = packed(model)
    before = model(X)
    model[0].weight.data.mul_(-2)
    for _ in range(2):  # frozen weights that show no change are left alone
        assert_bit_equal(model(X), before)
        weights.pack()
    weights.pack(everything=True)
    assert_bit_equal(model(X), before * -2)


def test_an_optimizer_that_writes_through_data_is_seen_after_pack() -> None:
    model = model_of()
    weights = packed(model)
    for parameter in model.parameters():
        parameter.data.mul_(-3)
    weights.pack()
    expect_fresh(model)


def test_one_launch_packs_all_of_a_kind(launches: list[int]) -> None:
    half, rows = model_of(2, torch.float16), model_of(4, mask="row")
    frozen = model_of(5).requires_grad_(False)
    model = nn.ModuleList([model_of(3), half, rows, frozen, nn.Linear(16, 16), SemiSparseActivationLinear(16, 16)])
    weights = PackedWeights(model)
    assert weights.pack() == 14 and weights.layers == 14
    assert sorted(launches) == [2, 4, 8]
    launches.clear()
    weights.pack()
    assert sorted(launches) == [2, 3, 4]  # frozen ones are packed once
    launches.clear()
    frozen(X)
    weights.pack_changed()
    assert launches == []


def test_the_first_forward_after_a_change_packs_all_that_changed(launches: list[int]) -> None:
    model = model_of(5)
    packed(model)
    with torch.no_grad():
        for layer in model[1:4]:
            layer.weight.neg_()
    launches.clear()
    for _ in range(3):
        model(X)
    assert launches == [3]


def test_frozen_weights_are_packed_again_when_they_change(launches: list[int]) -> None:
    model = model_of(2).requires_grad_(False)
    weights = packed(model)
    with torch.no_grad():
        model[1].weight.neg_()
    launches.clear()
    weights.pack()
    assert launches == [1]
    expect_fresh(model)


def test_buffers_keep_their_addresses() -> None:
    model = model_of()
    weights = packed(model)

    def places() -> list[int]:
        return [buffer.data_ptr() for layer in model for buffer in layer._packed.packed[:2]]

    first = places()
    for turn in range(4):
        in_place(model)
        weights.pack(everything=turn % 2 == 0) if turn < 3 else model(X)
        assert places() == first


def test_the_backward_of_an_older_graph_raises_instead_of_using_other_bytes() -> None:
    model = model_of()
    weights = packed(model)
    old = model(X.clone().requires_grad_())
    in_place(model)
    model(X)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        old.sum().backward()
    old = model(X.clone().requires_grad_())
    weights.pack()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        old.sum().backward()


def test_another_weight_for_one_call_leaves_the_buffers_alone() -> None:
    model = model_of()
    packed(model)
    old, expected = model(X.clone().requires_grad_()), model(X).detach()
    others = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    fresh = copy.deepcopy(model)
    fresh.load_state_dict(others)
    assert_bit_equal(torch.func.functional_call(model, others, (X,)), fresh(X).detach())
    old.sum().backward()
    assert_bit_equal(model(X).detach(), expected)


def test_transforms_see_the_weight() -> None:
    model = model_of()
    packed(model)
    in_place(model)
    fresh = copy.deepcopy(model)

    def loss(x: Tensor, of: nn.Module) -> Tensor:
        return of(x).float().square().sum()

    assert_bit_equal(torch.func.grad(loss)(X, model), torch.func.grad(loss)(X, fresh))


def test_dense_layers_hold_nothing(launches: list[int]) -> None:
    model = model_of()
    weights = packed(model)
    for layer in model:
        layer.sparse_enabled = False
    launches.clear()
    assert weights.pack() == 0 and not launches
    assert all(layer._packed is None for layer in model)
    model[1].sparse_enabled = True
    assert weights.pack() == 1
    expect_fresh(model)
    SemiSparseLinear.to_dense(model[1])
    assert weights.pack() == 0
    assert set(vars(model[1])) == set(vars(nn.Linear(16, 16)))


def test_close_lets_go_and_a_later_pack_begins_anew() -> None:
    model = model_of()
    weights = packed(model)
    buffer = torch.multiprocessing.reductions.StorageWeakRef(model[0]._packed.packed.matrix.untyped_storage())
    assert repr(weights) == "PackedWeights(keep='both', 3 layers packed, 0 fallbacks)"
    weights.close()
    assert weights.layers == 0 and all(layer._packed is None for layer in model)
    assert buffer.expired()
    weights.pack()
    expect_fresh(model)


def test_an_owner_that_is_dropped_leaves_no_packed_weight() -> None:
    model = model_of()
    weights = PackedWeights(model)
    assert weights.pack() == 3 and model[0]._packed is not None
    del weights
    gc.collect()
    assert all(layer._packed is None for layer in model)


def test_other_layers_are_left_alone() -> None:
    model = nn.Sequential(SemiSparseLinear(16, 16), SemiSparseLinear(16, 16, config=SparseConfig(backend="dense")))
    weights = packed(model)
    assert weights.layers == 0 and not weights.fallbacks
    expect_fresh(model, X.float())


def test_another_parameter_over_the_same_memory_is_another_weight() -> None:
    model = model_of(1)
    memory = model[0].weight.data
    other = nn.Parameter(memory)
    weights = packed(model)
    with torch.no_grad():
        while other._version < model[0].weight._version:
            other.mul_(1)
        model[0].weight.mul_(1)
        weights.pack()
        other.neg_()
    model[0].weight = other
    assert (other._version, other.data_ptr()) == (model[0]._packed._version, model[0]._packed._address)
    expect_fresh(model)
