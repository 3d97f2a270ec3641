"""A packing that is repeated packs what a new look would, or a new look is taken."""

import gc
import weakref

import pytest
import torch
from torch import nn

from semisparse import PackedWeights, SemiSparseLinear, ops, routes, sparsify
from semisparse.config import SparseConfig
from semisparse.nn.packed_weights import PackedWeights as Owner
from semisparse.ops import packing_many
from semisparse.testing import assert_bit_equal

X = torch.randn(8, 32).bfloat16()


class Launch:
    """What packs matrices on a GPU, as a loop."""

    def __init__(self, matrices, buffers, dtype, mask, codes, scales, capturing) -> None:
        self.given = list(zip(matrices, buffers, codes, scales, strict=True)), dtype, mask

    def launch(self) -> None:
        members, dtype, mask = self.given
        for matrix, into, codes, scale in members:
            for buffer, packed in zip(into[:2], ops.pack(matrix.detach(), dtype, mask, codes, scale), strict=True):
                buffer.copy_(packed)


@pytest.fixture
def surveys(monkeypatch: pytest.MonkeyPatch) -> list[Owner]:
    """The packings that looked at every layer anew; packing is by launches, as on a GPU."""
    monkeypatch.setattr(routes, "packs", lambda weight, dtype, backend: True)
    monkeypatch.setattr(packing_many, "_planned", lambda *given: packing_many._Plan([Launch(*given)], []))
    seen: list[Owner] = []
    survey = Owner._survey
    monkeypatch.setattr(Owner, "_survey", lambda self: seen.append(self) or survey(self))
    return seen


def network() -> nn.Sequential:
    net = nn.Sequential(*(nn.Linear(32, 32) for _ in range(3))).bfloat16()
    sparsify(net)
    return net


def assert_as_fresh(net: nn.Sequential) -> None:
    """The forward gives what layers that pack for themselves give."""
    ours, x = net(X), X
    for layer in net:
        fresh = SemiSparseLinear(32, 32, dtype=torch.bfloat16, config=getattr(layer, "sparse_config", None))
        fresh.load_state_dict(layer.state_dict())
        fresh.sparse_enabled = layer.sparse_enabled
        fresh.hold(codes=layer.held_codes, scale=layer.held_scale)
        x = fresh(x)
    assert_bit_equal(ours, x)


def test_steps_repeat_the_first_packing(surveys: list[Owner]) -> None:
    net = network()
    owner = PackedWeights(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    assert owner.pack() == 3
    for _ in range(3):
        net(X).sum().backward()
        optimizer.step()
        assert owner.pack() == 3
        assert_as_fresh(net)
    assert len(surveys) == 1


def replace_parameter(net: nn.Sequential) -> None:
    net[1].weight = nn.Parameter(torch.randn(32, 32).bfloat16())


def move_data(net: nn.Sequential) -> None:
    net[1].weight.data = torch.randn(32, 32).bfloat16()


def make_dense(net: nn.Sequential) -> None:
    net[1].sparse_enabled = False


def hold_codes(net: nn.Sequential) -> None:
    net[1].hold(codes=ops.tile_codes(torch.randn(32, 32), "transposable"))


def set_config(net: nn.Sequential) -> None:
    net[1].sparse_config = SparseConfig(weight="row")


@pytest.mark.parametrize("change", [replace_parameter, move_data, make_dense, hold_codes, set_config])
def test_a_changed_layer_is_looked_at_anew(surveys: list[Owner], change) -> None:
    net = network()
    owner = PackedWeights(net)
    owner.pack()
    change(net)
    owner.pack()
    assert len(surveys) == 2
    assert_as_fresh(net)


def test_a_layer_that_becomes_sparse_is_packed(surveys: list[Owner]) -> None:
    net = network()
    net[0].sparse_enabled = False
    owner = PackedWeights(net)
    assert owner.pack() == owner.pack() == 2
    assert len(surveys) == 1
    net[0].sparse_enabled = True
    assert owner.pack() == 3
    assert len(surveys) == 2
    assert_as_fresh(net)


def test_frozen_weights_are_left_alone_and_everything_looks_anew(surveys: list[Owner]) -> None:
    net = network()
    owner = PackedWeights(net)
    owner.pack()
    owner.pack(everything=True)
    assert len(surveys) == 2
    net[2].weight.requires_grad_(False)
    owner.pack()
    owner.pack()
    assert len(surveys) == 4  # a launch of all would pack the frozen one, too
    assert_as_fresh(net)


def test_nothing_is_repeated_after_close(surveys: list[Owner]) -> None:
    net = network()
    owner = PackedWeights(net)
    owner.pack()
    owner.close()
    with torch.no_grad():
        net[0].weight.neg_()
    assert_as_fresh(net)
    owner.pack()
    assert len(surveys) == 2
    assert_as_fresh(net)


def test_a_layer_that_was_made_dense_is_left_alone(surveys: list[Owner]) -> None:
    net = network()
    owner = PackedWeights(net)
    owner.pack()
    SemiSparseLinear.to_dense(net[0])
    with torch.no_grad():
        net[1].weight.neg_()
    net(X)  # packs net[1] again
    assert owner.pack() == 2
    surveys.clear()
    assert owner.pack() == 2
    assert not surveys
    assert_as_fresh(net[1:])


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("inside", [False, True])
def test_a_layer_that_was_replaced_is_given_up_with_its_memory_at_the_next_pack(
    surveys: list[Owner], inside: bool, kept: bool
) -> None:
    net = network()
    root = nn.Sequential(nn.Sequential(net)) if inside else net
    owner = PackedWeights(root)
    owner.pack()
    old = net[1]
    layer, weight = weakref.ref(old), weakref.ref(old.weight)
    buffer = torch.multiprocessing.reductions.StorageWeakRef(old._packed.packed.matrix.untyped_storage())
    net[1] = network()[0]
    if not kept:
        del old
    surveys.clear()
    assert owner.pack() == 3
    packing_many._PLANS.clear()  # on a GPU they hold addresses and no tensors
    gc.collect()
    assert buffer.expired()
    assert old._packed is None if kept else (layer(), weight()) == (None, None)
    assert owner.pack() == 3
    assert len(surveys) == 1
    assert_as_fresh(net)


def test_a_layer_that_was_added_is_packed_from_the_next_pack_on(surveys: list[Owner]) -> None:
    net = network()
    owner = PackedWeights(net)
    assert owner.pack() == 3
    net.append(network()[0])
    assert owner.pack() == 4
    assert_as_fresh(net)


def test_a_layer_that_was_made_dense_and_sparse_again_is_packed_per_step_again(surveys: list[Owner]) -> None:
    net = network()
    owner = PackedWeights(net)
    owner.pack()
    SemiSparseLinear.from_dense(SemiSparseLinear.to_dense(net[0]))
    assert_as_fresh(net)
    assert owner.pack() == owner.pack() == 3
    assert net[0]._packed is not None and len(surveys) == 2
    assert_as_fresh(net)
    owner.close()
    assert net[0]._packed is None
