"""Weights in e4m3 that are packed between forwards: what layers compute that pack at each forward, bit for bit."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from semisparse import SemiSparseLinear, SparseConfig, ops, reuse_packed
from semisparse.errors import EngineError
from semisparse.formats.layout import FP8, packed_bytes
from semisparse.masks import MaskName
from semisparse.testing import assert_bit_equal
from tests.functional.counting import CountOps
from tests.nn.packing import BF16, expect_fresh, in_place, packed

# Raised inside torch's own compiler.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
SIZE = 32
X = torch.linspace(-3, 2, 8 * SIZE).view(8, SIZE)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def model_of(layers: int = 2, dtype: torch.dtype = BF16, mask: MaskName | None = "transposable") -> nn.Sequential:
    config = SparseConfig(weight=mask, precision="fp8")
    return nn.Sequential(*(SemiSparseLinear(SIZE, SIZE, dtype=dtype, config=config) for _ in range(layers)))


@pytest.mark.parametrize("mask", ["transposable", "row", "greedy"])
def test_forwards_use_what_was_packed_and_see_every_change(mask: MaskName, launches: list[int]) -> None:
    model, x = model_of(mask=mask), X.bfloat16()
    weights = packed(model)
    assert weights.layers == 2 and not weights.fallbacks and launches == [2]
    places = [buffer.data_ptr() for layer in model for buffer in layer._packed.packed]
    expect_fresh(model, x)
    changes: list[Callable[[], object]] = [lambda: in_place(model), lambda: (in_place(model), weights.pack())]
    if mask == "transposable":
        changes.append(lambda: model[0].hold(codes=ops.tile_codes(torch.randn(SIZE, SIZE), mask)))
    for change in changes:
        before = model(x)
        change()
        assert not torch.equal(model(x), before)
        expect_fresh(model, x)
        with CountOps() as counted:
            model(x)
        assert "pack_fp8" not in counted.counts
    assert [buffer.data_ptr() for layer in model for buffer in layer._packed.packed] == places


def test_one_packing_serves_every_dtype(launches: list[int]) -> None:
    model = model_of(dtype=torch.float32)
    weights = packed(model)
    assert weights.layers == 2
    expect_fresh(model, X)
    for dtype in (BF16, torch.float16):
        with torch.autocast("cpu", dtype):
            expect_fresh(model, X)
            assert weights.pack() == 2
            expect_fresh(model, X)
    assert launches == [2] * 3


def test_layers_in_fp8_beside_others(packed_on_cpu: None, launches: list[int]) -> None:
    other = SparseConfig(precision="fp8")
    model = nn.Sequential(
        *model_of(2),
        SemiSparseLinear(SIZE, SIZE, dtype=BF16),
        SemiSparseLinear(SIZE, 48, dtype=BF16, config=other),  # packed for bf16: 48 is not a multiple of 32
        SemiSparseLinear(48, SIZE, dtype=BF16, config=other),
        *model_of(1, mask=None),
    )
    assert packed(model).layers == 5
    assert sorted(launches) == [2, 3]
    expect_fresh(model, X.bfloat16())
    model[0].sparse_config, model[2].sparse_config = SparseConfig(), other
    expect_fresh(model, X.bfloat16())
    assert [layer._packed.dtype for layer in model[:5]] == [BF16, FP8, FP8, BF16, BF16]


def test_a_weight_in_another_dtype_is_packed_again() -> None:
    model, x = model_of(), X.bfloat16()
    weights = packed(model)
    model.to(torch.float32)
    expect_fresh(model, X)
    model.to(torch.float64)
    expect_fresh(model, X.double())
    assert weights.pack() == 0
    model.to(BF16)
    assert weights.pack() == 2
    expect_fresh(model, x)


def test_the_backward_of_an_older_graph_raises() -> None:
    model, x = model_of(), X.bfloat16()
    weights = packed(model)
    old = model(x.requires_grad_())
    weights.pack(everything=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        old.sum().backward()


def test_both_directions_are_held_whatever_keep_says() -> None:
    model = model_of()
    packed(model, keep="forward")
    held = model[0]._packed.packed
    assert held.matrix.numel() == held.transposed.numel() == packed_bytes(32, 32, 1)
    expect_fresh(model, X.bfloat16())


def test_a_dense_phase_holds_nothing_and_transforms_see_the_weight() -> None:
    model, x = model_of(), X.bfloat16()
    weights = packed(model)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return model(x).float().square().sum()

    expected = torch.func.grad(loss)(x)
    masked_dense = torch.func.vmap(model)(x[None])
    for layer in model:
        layer.sparse_enabled = False
    assert weights.pack() == 0 and all(layer._packed is None for layer in model)
    expect_fresh(model, x)
    for layer in model:
        layer.sparse_enabled = True
    assert_bit_equal(torch.func.grad(loss)(x), expected)
    assert_bit_equal(torch.func.vmap(model)(x[None]), masked_dense)


@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_code_reads_what_was_packed_last_and_is_not_compiled_again(autocast: bool) -> None:
    dtype = torch.float32 if autocast else BF16
    model, x = model_of(1, dtype=dtype), X.to(dtype)
    weights = packed(model)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for _ in range(3):
        with torch.autocast("cpu", BF16, enabled=autocast):
            expect_fresh(model, x, compiled)
        in_place(model)
        weights.pack()
    assert counter.frame_count == 1


def test_compiled_forwards_do_not_pack(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = model_of(), X.bfloat16()
    packed(model)
    expected = model(x).detach()
    monkeypatch.setattr(ops, "pack_fp8", None)  # a call would break the graph
    assert_bit_equal(torch.compile(model, backend="aot_eager", fullgraph=True)(x).detach(), expected)


def test_blocks_pack_once_and_refuse_what_their_forwards_would() -> None:
    model, x = model_of(), X.bfloat16()
    expected = model(x)
    places = []
    for _ in range(2):
        with reuse_packed(model) as layers, CountOps() as counted:
            assert layers == 2
            assert_bit_equal(model(x), expected)
            places.append([buffer.data_ptr() for layer in model for buffer in layer._packed.packed])
        assert "pack_fp8" not in counted.counts
    assert places[0] == places[1]
    model[0].sparse_config = SparseConfig(precision="fp8", backend="cusparselt")
    with pytest.raises(EngineError, match="needs a CUDA weight"), reuse_packed(model):
        pass


def test_frozen_weights_are_packed_once(launches: list[int]) -> None:
    weights = packed(model_of().requires_grad_(False))
    for _ in range(2):
        assert weights.pack() == 2
    assert launches == [2]
