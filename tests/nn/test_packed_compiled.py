"""Packed weights in compiled and recorded code: no breaks, no compilation from step to step, the bytes packed last."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from semisparse import PackedWeights, Phase, SparseSchedule, ops, reuse_packed
from semisparse.errors import ConfigError
from semisparse.formats.layout import FP8
from semisparse.nn.pack_together import Keep, new_buffers
from semisparse.testing import assert_bit_equal
from tests.nn.packing import BF16, Mixed, X, expect_fresh, in_place, model_of, packed

pytestmark = [
    pytest.mark.usefixtures("packed_on_cpu"),
    # Raised inside torch's own compiler.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("autocast", [False, True])
def test_nothing_is_compiled_again_from_step_to_step(autocast: bool) -> None:
    dtype = torch.float32 if autocast else BF16
    model, x = model_of(dtype=dtype), X.to(dtype)
    weights = PackedWeights(model)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.autocast("cpu", BF16, enabled=autocast):
        weights.pack()
    for _ in range(4):
        with torch.autocast("cpu", BF16, enabled=autocast):
            expect_fresh(model, x, compiled)
        in_place(model)
        weights.pack()
    assert counter.frame_count == 1


def test_compiled_forwards_do_not_pack(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()
    weights = PackedWeights(model)
    weights.pack()
    expected = model(X).detach()
    for name in ("pack", "pack_linear"):
        monkeypatch.setattr(ops, name, None, raising=False)  # a call would break the graph
    assert_bit_equal(torch.compile(model, backend="aot_eager", fullgraph=True)(X).detach(), expected)


def test_the_dtype_of_autocast_is_learnt_from_compiled_code() -> None:
    model = model_of(dtype=torch.float32)
    weights = PackedWeights(model)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    counts = []
    for _ in range(4):
        counts.append(weights.pack())
        with torch.autocast("cpu", BF16):
            expect_fresh(model, X.float(), compiled)
        in_place(model)
    assert counts == [0, 3, 3, 3]
    assert counter.frame_count == 2


def test_what_compiled_code_cannot_see_is_seen_after_pack() -> None:
    model = model_of()
    weights = PackedWeights(model)
    weights.pack()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    before = compiled(X).detach()
    other = model_of()
    model.load_state_dict({name: value if "weight" in name else model.state_dict()[name]
                           for name, value in other.state_dict().items()})  # fmt: skip
    assert_bit_equal(compiled(X).detach(), before)
    weights.pack(everything=True)
    expect_fresh(model, X, compiled)
    weights.close()
    expect_fresh(model, X, compiled)


def test_blocks_that_are_compiled_each_share_one_compilation() -> None:
    model = nn.Sequential(*(model_of(1) for _ in range(6)))
    weights = PackedWeights(model)
    weights.pack()
    counter = CompileCounterWithBackend("aot_eager")
    for block in model:
        block.compile(backend=counter, fullgraph=True)
    for _ in range(3):
        expect_fresh(model)
        in_place(model)
        weights.pack()
    assert counter.frame_count == 1


def test_blocks_of_reuse_packed_are_compiled_once() -> None:
    model = model_of()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for _ in range(4):
        with reuse_packed(model):
            expect_fresh(model, X, compiled)
        in_place(model)
    assert counter.frame_count == 1


def test_a_schedule_compiles_once_more_when_packing_per_step_begins_and_never_after() -> None:
    model = model_of()
    schedule = SparseSchedule(model, [Phase("sparse", 5), Phase("dense", 2), Phase("sparse", 3)], pack="per_step")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    counts = []
    for _ in range(10):
        expect_fresh(model, X, compiled)
        optimizer.step()
        schedule.step()
        counts.append(counter.frame_count)
    assert counts == [1, 2, 2, 2, 2, 3, 3, 3, 3, 3]


def test_a_schedule_that_trusts_calls_packs_from_the_start() -> None:
    model = model_of()
    schedule = SparseSchedule(model, [Phase("sparse", 5)], pack="per_step")
    schedule.trust_calls()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for _ in range(4):
        expect_fresh(model, X, compiled)
        in_place(model)
        schedule.step()
    assert counter.frame_count == 1


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("how", ["export", "trace"])
def test_a_recorded_graph_packs_its_own_weight(how: str) -> None:
    model = model_of()
    weights = PackedWeights(model)
    weights.pack()
    recorded = torch.export.export(model, (X,)).module() if how == "export" else torch.jit.trace(model, X)
    with torch.no_grad():
        for parameter in recorded.parameters():
            parameter.zero_()
    assert not recorded(X).any()


def test_buffers_are_marked_as_torch_marks_static_addresses() -> None:
    marked = torch.empty(1)
    torch._dynamo.mark_static_address(marked, guard=False)
    buffers = [new_buffers(torch.empty(32, 32), dtype, True) for dtype in (BF16, FP8)]
    for buffer in (*buffers[0][:2], *buffers[1]):
        assert {name: value for name, value in vars(buffer).items() if name != "_packs"} == vars(marked)


def test_compiled_functional_call_computes_with_the_parameters_that_it_is_given() -> None:
    model = model_of()
    weights = PackedWeights(model)
    weights.pack()

    def call(parameters: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, parameters, (x,))

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    own = dict(model.named_parameters())
    others = {name: torch.randn_like(parameter) for name, parameter in own.items()}
    for parameters in (own, others, own):
        assert_bit_equal(compiled(parameters, X), call(parameters, X))


@pytest.mark.parametrize("keep", ["both", "forward"])
def test_compiled_code_computes_with_what_is_held_from_then_on(keep: Keep) -> None:
    model, soft = model_of(), model_of(mask="soft")
    for layer in soft:
        layer.hold(scale=torch.tensor(0.5))
    owners = [packed(of, keep) for of in (model, soft)]
    calls = [torch.compile(of, backend="aot_eager", fullgraph=True) for of in (model, soft)]
    for step in range(3):
        for layer in (*model, *soft):
            codes = ops.tile_codes(torch.randn(16, 16), "transposable") if step else None
            layer.hold(codes=codes) if layer.sparse_config.weight == "transposable" else layer.hold(
                scale=torch.tensor(1.5 + step)
            )
        for of, call in zip((model, soft), calls, strict=True):
            expect_fresh(of, X, call)
    assert [owner.layers for owner in owners] == [3, 3]


def test_compiled_code_fails_as_eager_code_does_where_a_scale_is_no_longer_held() -> None:
    model = model_of(1, mask="soft")
    model[0].hold(scale=torch.tensor(0.5))
    packed(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    expect_fresh(model, X, compiled)
    model[0].hold()
    for call in (model, compiled):
        with pytest.raises(ConfigError, match="start its recipe"):
            call(X)
    model[0].hold(scale=torch.tensor(2.0))
    expect_fresh(model, X, compiled)


def test_what_is_held_is_packed_at_once_into_the_same_buffers(launches: list[int]) -> None:
    model = model_of()
    model[1].hold(codes=ops.tile_codes(torch.randn(16, 16), "transposable"))
    owner = packed(model)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    expect_fresh(model, X, compiled)
    place, frames = model[1]._packed.packed.matrix.data_ptr(), counter.frame_count
    launches.clear()
    model[1].hold(codes=ops.tile_codes(torch.randn(16, 16), "transposable"))
    assert launches == [1] and owner.layers == 3
    expect_fresh(model, X, compiled)
    assert (model[1]._packed.packed.matrix.data_ptr(), counter.frame_count) == (place, frames)


@pytest.mark.parametrize("narrow_first", [False, True])
def test_the_dtype_of_autocast_is_learnt_for_the_layers_that_run_in_it(narrow_first: bool) -> None:
    model = Mixed(narrow_first)
    weights = PackedWeights(model)
    weights.ready = False  # as long as a schedule does not know that layers are called
    weights.pack()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    expect_fresh(model, X, compiled)
    weights.ready = True
    assert weights.pack() == 4
    expect_fresh(model, X, compiled)
    assert [layer._packed.dtype for layer in (*model.wide, *model.narrow)] == [torch.float16] * 2 + [BF16] * 2
