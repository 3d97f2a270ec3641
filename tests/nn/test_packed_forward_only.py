"""keep="forward": W~ alone is held, and the backward packs W~^T from the weight that was saved."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from semisparse import PackedWeights, Phase, SemiSparseLinear, SparseSchedule, ops, reuse_packed
from semisparse.errors import ConfigError
from semisparse.masks import MaskName
from semisparse.recipes import RecipeSchedule, dinov2
from semisparse.testing import assert_bit_equal
from tests.functional.counting import CountOps
from tests.nn.packing import BF16, X, expect_fresh, in_place, model_of, packed, results

pytestmark = pytest.mark.usefixtures("packed_on_cpu")


def buffers_of(model: nn.Sequential) -> list[Tensor]:
    return [layer._packed.packed.transposed for layer in model]


@pytest.mark.parametrize("mask", ["transposable", "row", "soft", "greedy", "codes"])
def test_results_are_those_of_packing_at_each_forward(mask: str) -> None:
    name: MaskName = "transposable" if mask == "codes" else mask  # type: ignore[assignment]
    model = model_of(mask=name)
    for layer in model:
        if mask == "codes":
            layer.hold(codes=ops.tile_codes(torch.randn(16, 16), "transposable"))
        elif mask == "soft":
            layer.hold(scale=torch.tensor(0.5))
    weights = packed(model, "forward")
    for _ in range(3):
        expect_fresh(model)
        in_place(model)
        expect_fresh(model)  # packed by the forward
        in_place(model)
        weights.pack()
    assert weights.layers == 3 and not any(buffer.numel() for buffer in buffers_of(model))


def test_the_backward_uses_the_weight_of_its_forward_or_raises() -> None:
    model = model_of()
    weights = packed(model, "forward")
    y = model(X.clone().requires_grad_())
    weights.pack(everything=True)  # of the same weights: nothing of the forward is needed any longer
    y.float().square().sum().backward()
    expected = results(copy.deepcopy(model))
    assert_bit_equal(model[0].weight.grad, expected[2])
    y = model(X.clone().requires_grad_())
    in_place(model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("mask", ["transposable", "row"])
def test_the_backward_packs_the_transpose_alone_and_only_where_there_is_one(mask: MaskName) -> None:
    model = model_of(3, mask=mask)
    packed(model, "forward")
    y = model(X.clone().requires_grad_()).float().square().sum()
    with CountOps() as counter:
        y.backward()
    packs = {name: count for name, count in counter.counts.items() if name.startswith("pack") and "matmul" not in name}
    assert packs == ({"pack_transpose": 3} if mask == "transposable" else {})


def test_nothing_packed_is_saved_and_the_weight_only_where_dx_is_asked_for() -> None:
    model = model_of(1)
    packed(model, "forward")
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    for needs, count in ((True, 2), (False, 1)):
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(X.clone().requires_grad_(needs))
        assert len(saved) == count and all(tensor.dtype == BF16 for tensor in saved)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_compiled_and_in_transforms() -> None:
    torch._dynamo.reset()
    model = model_of()
    weights = packed(model, "forward")
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for _ in range(3):
        expect_fresh(model, X, compiled)
        in_place(model)
        weights.pack()
    assert counter.frame_count == 1
    fresh = copy.deepcopy(model)

    def loss(x: Tensor, of: nn.Module) -> Tensor:
        return of(x).float().square().sum()

    assert_bit_equal(torch.func.grad(loss)(X, model), torch.func.grad(loss)(X, fresh))
    torch._dynamo.reset()


def test_a_double_backward_raises() -> None:
    model = model_of(1)
    packed(model, "forward")
    x = X.clone().requires_grad_()
    (grad,) = torch.autograd.grad(model(x).float().square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_under_autocast() -> None:
    model = model_of(dtype=torch.float32)
    with torch.autocast("cpu", BF16):
        packed(model, "forward")
        expect_fresh(model, X.float())


def test_blocks_and_copies_keep_what_was_asked_for() -> None:
    model = model_of()
    for keep, sizes in (("forward", {0}), ("both", {model_bytes(model)}), ("forward", {0})):
        with reuse_packed(model, keep=keep) as count:
            assert count == 3 and {buffer.numel() for buffer in buffers_of(model)} == sizes
            expect_fresh(model)
    other, weights = copy.deepcopy((model, PackedWeights(model, keep="forward")))
    weights.pack()
    assert not any(buffer.numel() for buffer in buffers_of(other))


def model_bytes(model: nn.Sequential) -> int:
    return ops.pack(model[0].weight.detach(), BF16, "transposable")[1].numel()


def test_schedules_take_it() -> None:
    model = model_of()
    schedule = SparseSchedule(model, [Phase("sparse", 3)], pack="per_step", keep="forward")
    schedule.trust_calls()
    assert not any(buffer.numel() for buffer in buffers_of(model))
    in_place(model)
    schedule.step()
    expect_fresh(model)


STARTS: dict[str, Callable[..., object]] = {
    "schedule": lambda model, **kw: SparseSchedule(model, [Phase("sparse", 3)], **kw),
    "recipe": lambda model, **kw: RecipeSchedule(dinov2(), model, torch.optim.SGD(model.parameters(), lr=0.1), 3, **kw),
}


@pytest.mark.parametrize("start", STARTS)
def test_wrong_values_are_refused(start: str) -> None:
    model = nn.Sequential(SemiSparseLinear(16, 16))
    with pytest.raises(ConfigError, match=r"keep='backward' is not one of 'both', 'forward'"):
        STARTS[start](model, pack="per_step", keep="backward")
    with pytest.raises(ConfigError, match=r"keep='forward' needs pack='per_step'"):
        STARTS[start](model, keep="forward")
    with pytest.raises(ConfigError, match=r"keep=None is not one of"):
        PackedWeights(model, keep=None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"keep=1 is not one of"), reuse_packed(model, keep=1):  # type: ignore[arg-type]
        pass
