"""reuse_packed: packed weights know what they are for, and never travel."""

import contextlib
import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import CheckpointError, checkpoint

from semisparse import SemiSparseLinear, SparseConfig, ops, reuse_packed
from semisparse.errors import ConfigError, EngineError
from semisparse.nn.pack_together import Keep
from semisparse.testing import assert_bit_equal
from tests.support import through_a_file

X = torch.arange(64.0).reshape(4, 16).sub(31).div(16)


pytestmark = pytest.mark.usefixtures("packed_on_cpu")


def model_of(dtype: torch.dtype = torch.bfloat16, layers: int = 1) -> nn.Sequential:
    return nn.Sequential(*(SemiSparseLinear(16, 16, bias=False, dtype=dtype) for _ in range(layers)))


COPIES = {
    "deepcopy": copy.deepcopy,
    "copy of the layer": lambda model: nn.Sequential(copy.copy(model[0])),
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": through_a_file,
    "of a list": lambda model: copy.deepcopy([model])[0],
    "replica": lambda model: nn.Sequential(model[0]._replicate_for_data_parallel()),
}


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_made_inside_a_block_packs_its_own_weight(how: str) -> None:
    model, x = model_of(), X.bfloat16()
    with reuse_packed(model):
        expected = model(x)
        other = COPIES[how](model)
        assert other[0]._packed is None
        if how == "replica":  # DataParallel gives it a weight of its own next
            other[0].weight, other[0].bias = model[0].weight.detach().clone(), None
        assert_bit_equal(other(x), expected)
        if how != "copy of the layer":  # which shares its table of parameters with the original
            with torch.no_grad():
                other[0].weight.zero_()
            assert not other(x).any()
        assert_bit_equal(model(x), expected)


def test_a_copy_of_a_parametrised_layer_packs_its_own_weight() -> None:
    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight * 2

    model, x = model_of(), X.bfloat16()
    parametrize.register_parametrization(model[0], "weight", Doubled())
    with parametrize.cached(), reuse_packed(model):
        model(x)
        other = copy.deepcopy(model)
    assert other[0]._packed is None
    with torch.no_grad():
        other[0].parametrizations.weight.original.zero_()
    assert not other(x).any()


@pytest.mark.parametrize("entered", [torch.float16, torch.bfloat16, None])
@pytest.mark.parametrize("used", [torch.float16, torch.bfloat16])
def test_a_forward_in_another_dtype_packs_again_and_warns(entered: torch.dtype | None, used: torch.dtype) -> None:
    model = model_of(torch.float32)
    with torch.autocast("cpu", dtype=used):
        expected = model(X)
    before = contextlib.nullcontext() if entered is None else torch.autocast("cpu", dtype=entered)
    with before, reuse_packed(model) as packed, torch.autocast("cpu", dtype=used):
        assert packed == (entered is not None)
        says = pytest.warns(UserWarning, match=rf"entered computing in {entered}, but this forward computes in {used}")
        with says if entered not in (None, used) else contextlib.nullcontext():
            assert_bit_equal(model(X), expected)


@pytest.mark.parametrize("first", ["inference", "no_grad", "train"])
@pytest.mark.parametrize("then", ["inference", "no_grad", "train"])
def test_blocks_in_any_order_of_modes(first: str, then: str) -> None:
    modes = {"inference": torch.inference_mode, "no_grad": torch.no_grad, "train": contextlib.nullcontext}
    model, x = model_of(), X.bfloat16()
    expected = model(x).detach()
    for mode in (first, then, "train"):
        with modes[mode](), reuse_packed(model):
            y = model(x)
        assert_bit_equal(y.detach().clone(), expected)
        if mode == "train":
            y.sum().backward()
            assert model[0].weight.grad is not None
        with torch.no_grad():
            model[0].weight.mul_(1)  # another version, the same values


def test_a_block_inside_a_block_leaves_the_outer_packing() -> None:
    model, x = model_of(layers=2), X.bfloat16()
    expected = model(x)
    with reuse_packed(model):
        outer = model[0]._packed
        with reuse_packed(model[0]) as inner:
            assert inner == 1
            assert model[0]._packed.packed.matrix is not outer.packed.matrix  # packed again, in buffers of its own
            assert_bit_equal(model(x), expected)
        assert model[0]._packed is outer
        assert_bit_equal(model(x), expected)
    assert model[0]._packed is None


def test_a_block_in_another_dtype_inside_a_block_uses_other_buffers() -> None:
    model = model_of(torch.float32)
    autocast = {dtype: torch.autocast("cpu", dtype=dtype) for dtype in (torch.float16, torch.bfloat16)}
    expected = {}
    for dtype, context in autocast.items():
        with context:
            expected[dtype] = model(X)
    with autocast[torch.bfloat16], reuse_packed(model):
        with torch.autocast("cpu", dtype=torch.float16), reuse_packed(model):
            assert_bit_equal(model(X), expected[torch.float16])
        assert_bit_equal(model(X), expected[torch.bfloat16])


@pytest.mark.parametrize("how", ["in place", "a new Parameter", "functional_call"])
def test_a_weight_that_changed_inside_a_block_is_seen(how: str) -> None:
    model, x = model_of(), X.bfloat16()
    with reuse_packed(model):
        model(x)
        call = model
        if how == "in place":
            with torch.no_grad():
                model[0].weight.zero_()
        elif how == "a new Parameter":
            model[0].weight = nn.Parameter(torch.zeros_like(model[0].weight))
        else:
            zero = {"0.weight": torch.zeros_like(model[0].weight)}
            call = lambda x: torch.func.functional_call(model, zero, (x,))  # noqa: E731
        with pytest.warns(UserWarning, match="another weight or mask"):
            y = call(x)
        assert_bit_equal(y, torch.zeros_like(y))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of torch's own compiler
@pytest.mark.parametrize("compiled", [False, True])
def test_what_is_held_inside_blocks_is_used_in_all_of_them(compiled: bool) -> None:
    torch._dynamo.reset()
    model, x = model_of(), X.bfloat16()
    call = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    with reuse_packed(model):
        with reuse_packed(model):
            before = call(x)
            with pytest.warns(UserWarning, match="call hold outside the block") as warned:
                model[0].hold(codes=ops.tile_codes(torch.zeros(16, 16), "transposable"))
            assert {warning.filename for warning in warned} == {__file__}
            expected = copy.deepcopy(model)(x)
            assert not torch.equal(expected, before)
            assert_bit_equal(call(x), expected)
        assert_bit_equal(call(x), expected)
    assert_bit_equal(call(x), expected)


def test_the_buffers_stay_where_they_are() -> None:
    model = model_of()
    places = []
    for _ in range(3):
        with reuse_packed(model):
            places.append((model[0]._packed.packed.matrix.data_ptr(), model[0]._packed.packed.transposed.data_ptr()))
        with torch.no_grad():
            model[0].weight.add_(1)
    assert len(set(places)) == 1


def test_an_entry_that_fails_leaves_every_layer_as_it_was() -> None:
    model = nn.Sequential(model_of(), SemiSparseLinear(16, 16, config=SparseConfig(backend="cusparselt")))
    with pytest.raises(EngineError), reuse_packed(model):
        pass
    assert model[0][0]._packed is None


def test_a_block_that_raises_leaves_no_packing() -> None:
    model = model_of()
    with pytest.raises(KeyError), reuse_packed(model):
        raise KeyError
    assert model[0]._packed is None


@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("kind", ["fused", "foreach"])
def test_an_optimizer_step_inside_a_block_is_seen(cls: type, kind: str) -> None:
    model, x = model_of(), X.bfloat16()
    optimizer = cls(model.parameters(), lr=0.5, **{kind: True})
    with reuse_packed(model):
        model(x).sum().backward()
        optimizer.step()  # torch does not raise a weight's version in a fused one
        with pytest.warns(UserWarning, match="another weight or mask"):
            stale = model(x)
        with reuse_packed(model):
            inner = model(x)
    fresh = model(x)
    assert_bit_equal(stale, fresh)
    assert_bit_equal(inner, fresh)


def test_data_that_was_replaced_is_seen() -> None:
    model, x = model_of(), X.bfloat16()
    with reuse_packed(model):
        model[0].weight.data = torch.zeros_like(model[0].weight)
        with pytest.warns(UserWarning, match="another weight or mask"):
            assert not model(x).any()


def test_blocks_may_end_in_any_order() -> None:
    model, x = model_of(), X.bfloat16()
    expected = model(x)
    first, second = reuse_packed(model), reuse_packed(model)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert_bit_equal(model(x), expected)
    second.__exit__(None, None, None)
    assert model[0]._packed is None


def test_only_modules_have_packings() -> None:
    with pytest.raises(ConfigError, match=r"pass a torch\.nn\.Module"), reuse_packed(3):
        pass


@pytest.mark.parametrize("keep", ["both", "forward"])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("inside", [True, False])
def test_checkpointed_forwards(keep: Keep, reentrant: bool, inside: bool) -> None:
    model, x = model_of(layers=2), X.bfloat16()
    expected = [y.requires_grad_() for y in (x.clone(), x.clone())]
    model(expected[0]).float().square().sum().backward()
    weights = [layer.weight.grad for layer in model]
    model.zero_grad()
    with reuse_packed(model, keep=keep):
        loss = checkpoint(model, expected[1], use_reentrant=reentrant).float().square().sum()
        if inside:
            loss.backward()
    if not inside:
        if keep == "forward" and not reentrant:
            with pytest.raises(CheckpointError):  # reuse_packed says so
                loss.backward()
            return
        loss.backward()
    assert_bit_equal(expected[1].grad, expected[0].grad)
    for layer, grad in zip(model, weights, strict=True):
        assert_bit_equal(layer.weight.grad, grad)
