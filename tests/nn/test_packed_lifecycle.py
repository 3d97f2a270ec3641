"""PackedWeights where a model goes: autocast, sharded and computed weights, copies, threads, checkpoints."""

import copy
import logging
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

from semisparse import PackedWeights
from semisparse.errors import ConfigError
from semisparse.testing import assert_bit_equal
from tests.nn.packing import BF16, Mixed, X, expect_fresh, in_place, model_of, packed, results
from tests.support import COPIES

pytestmark = pytest.mark.usefixtures("packed_on_cpu")


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


@pytest.mark.parametrize("pack_inside", [False, True])
@pytest.mark.parametrize("narrow_first", [False, True])
def test_layers_inside_and_outside_of_autocast_are_each_packed_once_in_their_dtype(
    pack_inside: bool, narrow_first: bool, launches: list[int]
) -> None:
    model = Mixed(narrow_first)
    weights = PackedWeights(model)
    for step in range(3):
        with torch.autocast("cpu", torch.float16) if pack_inside else nullcontext():
            weights.pack()
        if step == 0:
            in_place(model)
        expect_fresh(model)
        launches.clear()
        expect_fresh(model)
        assert launches == []
        assert [layer._packed.dtype for layer in (*model.wide, *model.narrow)] == [torch.float16] * 2 + [BF16] * 2
        in_place(model)
        with torch.autocast("cpu", torch.float16) if pack_inside else nullcontext():
            assert weights.pack() == 4
        assert launches == [2, 2]


def test_a_narrow_weight_under_another_autocast_is_told_how_to_be_packed() -> None:
    model = model_of(1)
    weights = packed(model)
    for _ in range(2):
        with torch.autocast("cpu", torch.float16):
            with pytest.warns(UserWarning, match=r"in torch.bfloat16 are packed .* convert the layer to torch.float16"):
                model(X)
            weights.pack()
        expect_fresh(model)


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
