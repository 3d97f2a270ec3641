"""PackedWeights: whatever writes the weights, forwards compute what a layer that packs at each forward does."""

import copy
import gc
import logging
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from semisparse import PackedWeights, SemiSparseActivationLinear, SemiSparseLinear, SparseConfig, ops
from semisparse.errors import ConfigError
from semisparse.masks import MaskName
from semisparse.testing import assert_bit_equal, small_integers
from tests.support import through_a_file

pytestmark = pytest.mark.usefixtures("packed_on_cpu")
BF16 = torch.bfloat16
X = small_integers((8, 16), seed=1, dtype=BF16)


def model_of(layers: int = 3, dtype: torch.dtype = BF16, mask: MaskName = "transposable") -> nn.Sequential:
    config = SparseConfig(weight=mask)
    return nn.Sequential(*(SemiSparseLinear(16, 16, dtype=dtype, config=config) for _ in range(layers)))


ALIVE: list[PackedWeights] = []


@pytest.fixture(autouse=True)
def alive() -> Iterator[None]:
    """Packed weights live as long as their owner."""
    yield
    ALIVE.clear()


def packed(model: nn.Module) -> PackedWeights:
    weights = PackedWeights(model)
    weights.pack()
    ALIVE.append(weights)
    return weights


def results(model: nn.Module, x: Tensor = X, call: Callable[[Tensor], Tensor] | None = None) -> list[Tensor]:
    """Output and gradients."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    output = (model if call is None else call)(x)
    output.float().square().sum().backward()
    return [output.detach(), x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


def expect_fresh(model: nn.Module, x: Tensor = X) -> None:
    """model computes what a copy of it does, which packs at each forward."""
    other = copy.deepcopy(model)
    assert all(layer._packed is None for layer in other.modules() if isinstance(layer, SemiSparseLinear))
    for ours, expected in zip(results(model, x), results(other, x), strict=True):
        assert_bit_equal(ours, expected)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of matrices of each call of ops.pack_many."""
    counts: list[int] = []
    original = ops.pack_many

    def counting(matrices: list[Tensor], *args: object) -> None:
        counts.append(len(matrices))
        original(matrices, *args)

    monkeypatch.setattr(ops, "pack_many", counting)
    return counts


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


def in_place(model: nn.Sequential) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))


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


@pytest.mark.parametrize("how", ["pack inside", "first forward"])
def test_the_dtype_of_autocast_is_learnt(how: str, launches: list[int]) -> None:
    model = model_of(dtype=torch.float32)
    with torch.autocast("cpu", BF16) if how == "pack inside" else nullcontext():
        weights = packed(model)
    assert weights.layers == (3 if how == "pack inside" else 0)
    for _ in range(3):
        with torch.autocast("cpu", BF16):
            expect_fresh(model, X.float())
        in_place(model)
        launches.clear()
        assert weights.pack() == 3 and launches == [3]  # outside of autocast, as after an optimizer step
        with torch.autocast("cpu", BF16):
            expect_fresh(model, X.float())
        assert launches == [3]
    expect_fresh(model, X.float())  # masked dense, without a word


def test_a_forward_in_another_dtype_is_told_and_packs_for_itself() -> None:
    model = model_of(1, dtype=torch.float32)
    with torch.autocast("cpu", BF16):
        packed(model)
    before = model[0]._packed.packed.matrix.clone()
    expected = copy.deepcopy(model)
    with torch.autocast("cpu", torch.float16):
        with pytest.warns(
            UserWarning, match=r"packed for computing in torch.bfloat16, but this forward .* torch.float16"
        ):
            ours = model(X.float())
        assert_bit_equal(ours, expected(X.float()))
    assert torch.equal(model[0]._packed.packed.matrix, before)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


def with_inference_weight() -> nn.Sequential:
    with torch.inference_mode():
        return model_of(1)


def parametrised() -> nn.Sequential:
    model = model_of(1)
    parametrize.register_parametrization(model[0], "weight", Doubled())
    return model


def offloaded() -> nn.Sequential:
    model = model_of(1)
    model[0].weight.data = torch.empty(0, dtype=BF16)
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (parametrised, "computed at each forward"),
        (with_inference_weight, "inference_mode"),
        (offloaded, "not in memory"),
    ],
)
def test_weights_that_cannot_be_packed_between_forwards_say_why(
    make: Callable[[], nn.Sequential], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = nn.Sequential(make(), model_of(1))
    weights = PackedWeights(model)
    with caplog.at_level(logging.WARNING, "semisparse"):
        assert [weights.pack() for _ in range(3)] == [1, 1, 1]
    assert list(weights.fallbacks) == ["0.0"] and reason in weights.fallbacks["0.0"]
    assert [record.message for record in caplog.records] == [
        f"1 layers pack at each forward, not once per step; the first is 0.0: {weights.fallbacks['0.0']}"
    ]
    if reason != "not in memory":
        with torch.inference_mode():
            assert_bit_equal(model(X), copy.deepcopy(model)(X))


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore::UserWarning:torch")
def test_sharded_weights_pack_at_each_forward(one_rank: None) -> None:
    model = model_of(2)
    expected = copy.deepcopy(model)
    weights = packed(model)
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    assert weights.pack() == 0
    assert set(weights.fallbacks) == {"0", "1"} and "FSDP" in weights.fallbacks["0"]
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.5) for m in (model, expected)]
    for _ in range(3):
        for net, optimizer in zip((model, expected), optimizers, strict=True):
            net(X).float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        weights.pack()
        assert_bit_equal(model(X), expected(X))


COPIES: dict[str, Callable[[object], object]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "torch.save": through_a_file,
}


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_belongs_to_the_copied_model_and_has_packed_nothing(how: str) -> None:
    model = model_of()
    model.weights = packed(model)
    keys = list(model_of().state_dict())
    assert list(model.state_dict()) == keys
    other = COPIES[how](model)
    assert other.weights.layers == 0 and all(layer._packed is None for layer in other[:3])
    with torch.no_grad():
        other[0].weight.zero_()
    assert other.weights.pack() == 3
    assert_bit_equal(other[0](X), other[0].bias.expand(8, 16))
    assert not torch.equal(model[0](X), other[0](X))


def test_replicas_pack_for_themselves() -> None:
    model = model_of(1)
    packed(model)
    replica = model[0]._replicate_for_data_parallel()
    replica.weight, replica.bias = model[0].weight.detach() * 2, model[0].bias
    assert replica._packed is None
    expected = copy.deepcopy(model[0])
    with torch.no_grad():
        expected.weight.mul_(2)
    assert_bit_equal(replica(X), expected(X))


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_what_inference_packed_serves_training(mode: type) -> None:
    model = model_of()
    weights = PackedWeights(model)
    with mode():
        weights.pack()
        model(X)
    expect_fresh(model)
    in_place(model)
    with mode():
        ours = model(X)
    assert_bit_equal(ours.clone(), copy.deepcopy(model)(X).detach())
    expect_fresh(model)


def test_threads_that_meet_a_change_together() -> None:
    model = model_of()
    packed(model)
    wrong: list[int] = []
    for _ in range(10):
        in_place(model)
        with torch.no_grad():
            expected = copy.deepcopy(model)(X)

        def work(expected: Tensor = expected) -> None:
            with torch.no_grad():
                wrong.extend(1 for _ in range(5) if not torch.equal(model(X), expected))

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_layers(reentrant: bool) -> None:
    model = model_of()
    weights = packed(model)
    for _ in range(3):
        ours = results(model, call=lambda x: checkpoint(model, x, use_reentrant=reentrant))
        for mine, expected in zip(ours, results(copy.deepcopy(model)), strict=True):
            assert_bit_equal(mine, expected)
        in_place(model)
        weights.pack()


def test_a_weight_that_is_shared_is_packed_for_each_layer() -> None:
    model = model_of(2)
    model[1].weight = model[0].weight
    weights = packed(model)
    expect_fresh(model)
    in_place(model)
    weights.pack()
    expect_fresh(model)


def test_only_modules_have_packed_weights() -> None:
    with pytest.raises(ConfigError, match=r"pass a torch\.nn\.Module"):
        PackedWeights(3)  # type: ignore[arg-type]
