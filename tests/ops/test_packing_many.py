"""pack_many: the bytes of pack, in buffers that stay where they are."""

import gc
import weakref
from collections import OrderedDict

import pytest
import torch

from semisparse import ops
from semisparse.errors import ConfigError, EngineError, ShapeError, TensorError
from semisparse.formats.layout import FP8, PADDING, sm90_layout
from semisparse.formats.packed import PackedMatrix
from semisparse.ops import packing_many
from semisparse.testing import assert_bit_equal

BF16 = torch.bfloat16
SIZES = [(16, 32), (64, 48), (32, 16)]


@pytest.mark.parametrize("mask", ["transposable", "row", "soft", "greedy", "codes"])
def test_the_bytes_are_those_of_pack_and_the_versions_rise(mask: str) -> None:
    matrices = [torch.randn(size, requires_grad=True) for size in SIZES]
    codes = [ops.tile_codes(torch.randn(size), "transposable") for size in SIZES] if mask == "codes" else None
    scales = [torch.tensor(at + 0.5) for at in range(len(SIZES))] if mask == "soft" else None
    name = "transposable" if mask == "codes" else mask
    expected = [
        ops.pack(matrix.detach(), torch.bfloat16, name, codes and codes[at], scales and scales[at])
        for at, matrix in enumerate(matrices)
    ]
    buffers = [PackedMatrix(*(torch.zeros_like(buffer) for buffer in pair)) for pair in expected]
    places = [(b.matrix.data_ptr(), b.matrix._version, b.transposed._version) for b in buffers]
    ops.pack_many(matrices, buffers, torch.bfloat16, name, codes, scales)
    for ours, pair, (place, version, version_t) in zip(buffers, expected, places, strict=True):
        assert_bit_equal(ours.matrix, pair[0])
        assert_bit_equal(ours.transposed, pair[1])
        assert ours.matrix.data_ptr() == place
        assert ours.matrix._version > version
        assert ours.transposed._version > version_t or not ours.transposed.numel()


def test_an_empty_buffer_leaves_the_transpose_out() -> None:
    matrix = torch.randn(32, 16)
    packed, _ = ops.pack(matrix, torch.bfloat16, "transposable")
    buffers = PackedMatrix(torch.zeros_like(packed), packed.new_empty(0))
    ops.pack_many([matrix], [buffers], torch.bfloat16, "transposable")
    assert_bit_equal(buffers.matrix, packed)
    assert not buffers.transposed.numel()


@pytest.fixture
def by_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """pack_many plans as on a GPU whose format the kernel writes; the kernel runs in Triton's interpreter."""
    if torch.cuda.is_available():
        pytest.skip("kernels of CPU tensors need the interpreter")
    monkeypatch.setattr(packing_many, "_kernel_layout", lambda matrices, dtype: sm90_layout(dtype))
    monkeypatch.setattr(packing_many, "_PLANS", OrderedDict())


def buffers_for(matrix: torch.Tensor, mask: str = "row") -> PackedMatrix:
    """Of padding, which kernels leave at their ends."""
    return PackedMatrix(*(torch.full_like(buffer, PADDING) for buffer in ops.pack(matrix, BF16, mask)))


def assert_packed(matrix: torch.Tensor, into: PackedMatrix, mask: str = "row") -> None:
    expected = ops.pack(matrix, BF16, mask)
    assert_bit_equal(into.matrix, expected[0])
    assert_bit_equal(into.transposed, expected[1])


def test_matrices_with_codes_and_without_and_those_the_kernel_cannot_take(by_kernel: None) -> None:
    matrices = [torch.randn(size).bfloat16() for size in (*SIZES, (48, 80))]
    matrices[1] = matrices[1].mT.contiguous().mT
    codes = [None, None, ops.tile_codes(torch.randn(32, 16), "transposable"), None]
    buffers = [buffers_for(matrix, "transposable") for matrix in matrices]
    assert ops.pack_many(matrices, buffers, BF16, "transposable", codes) is None
    for matrix, into, held in zip(matrices, buffers, codes, strict=True):
        expected = ops.pack(matrix, BF16, "transposable", held)
        assert_bit_equal(into.matrix, expected[0])
        assert_bit_equal(into.transposed, expected[1])
    (plan,) = packing_many._PLANS.values()
    assert len(plan.batches) == 2
    assert plan.alone == [1]


def test_a_plan_is_used_again_for_new_values_and_by_what_is_returned(by_kernel: None) -> None:
    matrices = [torch.randn(size).bfloat16() for size in SIZES]
    buffers = [buffers_for(matrix) for matrix in matrices]
    again = ops.pack_many(matrices, buffers, BF16, "row")
    version = buffers[0].matrix._version
    for pack in (lambda: ops.pack_many(matrices, buffers, BF16, "row"), again):
        for matrix in matrices:
            matrix.neg_().add_(1)
        pack()
        for matrix, into in zip(matrices, buffers, strict=True):
            assert_packed(matrix, into)
        assert buffers[0].matrix._version > version
        version = buffers[0].matrix._version
    assert len(packing_many._PLANS) == 1


def test_views_with_one_address_and_shape_are_told_apart(by_kernel: None) -> None:
    wide = torch.randn(16, 64).bfloat16()
    for view in (wide[:, :32], wide[:, ::2], wide[:, :32]):
        into = buffers_for(view)
        ops.pack_many([view], [into], BF16, "row")
        assert_packed(view, into)


def test_a_buffer_that_became_too_short_is_refused(by_kernel: None) -> None:
    matrix = torch.randn(64, 32).bfloat16()
    into = buffers_for(matrix)
    ops.pack_many([matrix], [into], BF16, "row")
    with pytest.raises(ShapeError, match="packed has 16 bytes"):
        ops.pack_many([matrix], [PackedMatrix(into.matrix[:16], into.transposed)], BF16, "row")


def test_a_buffer_that_is_not_aligned_is_filled_and_nothing_around_it(by_kernel: None) -> None:
    matrix = torch.randn(64, 32).bfloat16()
    into = buffers_for(matrix)
    room = torch.zeros(into.matrix.numel() + 16, dtype=torch.uint8)
    shifted = PackedMatrix(room[8:-8], into.transposed)
    ops.pack_many([matrix], [shifted], BF16, "row")
    assert_packed(matrix, shifted)
    assert not room[:8].any()
    assert not room[-8:].any()


def test_plans_are_bounded(by_kernel: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing_many, "_MOST", 2)
    matrices = [torch.randn(16, 16).bfloat16() for _ in range(3)]
    for matrix in matrices:
        ops.pack_many([matrix], [buffers_for(matrix)], BF16, "row")
    assert len(packing_many._PLANS) == 2


def test_a_table_is_not_built_while_a_graph_is_captured(by_kernel: None, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = torch.randn(64, 32).bfloat16()
    into = buffers_for(matrix)
    with monkeypatch.context() as patch:
        patch.setattr(packing_many, "_capturing", lambda matrices: True)
        with pytest.raises(EngineError, match="pack them once before the capture"):
            ops.pack_many([matrix], [into], BF16, "row")
        assert not packing_many._PLANS
    ops.pack_many([matrix], [into], BF16, "row")
    assert_packed(matrix, into)


def test_a_table_that_a_graph_reads_lives_as_long_as_a_buffer_that_it_writes(
    by_kernel: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrices = [torch.randn(64, 32).bfloat16() for _ in range(2)]
    buffers = [buffers_for(matrix) for matrix in matrices]
    ops.pack_many(matrices, buffers, BF16, "row")
    table = weakref.ref(next(iter(packing_many._PLANS.values())).batches[0])
    monkeypatch.setattr(packing_many, "_capturing", lambda matrices: True)
    for _ in range(2):
        ops.pack_many(matrices, buffers, BF16, "row")
    packing_many._PLANS.clear()  # as new plans do
    assert table() is not None
    del buffers[0]
    assert table() is not None
    del buffers[0]
    gc.collect()
    assert table() is None


def test_what_does_not_belong_together_is_refused() -> None:
    first, second = torch.randn(16, 16), torch.randn(16, 16)
    buffers = [buffers_for(first), buffers_for(second)]
    with pytest.raises(TensorError, match=r"torch\.float16 on cpu and torch\.float32"):
        ops.pack_many([first, second.half()], buffers, BF16, "row")
    with pytest.raises(ShapeError, match="buffers has 1 entries for 2 matrices"):
        ops.pack_many([first, second], buffers[:1], BF16, "row")
    with pytest.raises(ShapeError, match="codes has 1 entries for 2 matrices"):
        ops.pack_many([first, second], buffers, BF16, "transposable", [None])
    with pytest.raises(ShapeError, match="scales has 3 entries for 2 matrices"):
        ops.pack_many([first, second], buffers, BF16, "soft", None, [torch.ones(())] * 3)


# ---- in e4m3


def empty_fp8(matrix: torch.Tensor, mask: str) -> PackedMatrix:
    return PackedMatrix(*(torch.full_like(buffer, PADDING) for buffer in ops.pack_fp8(matrix, mask, None)))


def assert_packed_fp8(
    matrix: torch.Tensor, into: PackedMatrix, mask: str = "row", codes: torch.Tensor | None = None
) -> None:
    for ours, expected in zip(into, ops.pack_fp8(matrix, mask, codes), strict=True):
        assert ours is not None
        assert_bit_equal(ours, expected)


@pytest.mark.parametrize("mask", ["transposable", "row", "greedy", "codes"])
def test_in_e4m3_the_bytes_and_scales_are_those_of_pack_fp8_and_all_versions_rise(mask: str) -> None:
    matrices = [torch.randn(size, requires_grad=True) for size in ((32, 64), (96, 32))]
    codes = [ops.tile_codes(torch.randn_like(matrix), "transposable") for matrix in matrices]
    name, held = ("transposable", codes) if mask == "codes" else (mask, [None, None])
    buffers = [empty_fp8(matrix.detach(), name) for matrix in matrices]
    before = [[buffer._version for buffer in into] for into in buffers]
    ops.pack_many(matrices, buffers, FP8, name, held)
    for matrix, into, given, versions in zip(matrices, buffers, held, before, strict=True):
        assert_packed_fp8(matrix.detach(), into, name, given)
        assert all(b._version > v for b, v in zip(into, versions, strict=True) if b.numel())


def test_in_e4m3_by_the_kernel_and_alone_what_that_cannot_take(by_kernel: None) -> None:
    matrices = [torch.randn(size).bfloat16() for size in ((32, 64), (32, 32), (64, 32))]
    matrices[1] = matrices[1].mT
    codes = [None, None, ops.tile_codes(torch.randn(64, 32), "transposable")]
    buffers = [empty_fp8(matrix, "transposable") for matrix in matrices]
    ops.pack_many(matrices, buffers, FP8, "transposable", codes)
    for matrix, into, held in zip(matrices, buffers, codes, strict=True):
        assert_packed_fp8(matrix, into, "transposable", held)
    (plan,) = packing_many._PLANS.values()
    assert len(plan.batches) == 2 and plan.alone == [1]


def test_in_e4m3_a_plan_is_used_again_and_another_scale_gets_its_own(by_kernel: None) -> None:
    matrix = torch.randn(32, 32)
    into = empty_fp8(matrix, "row")
    again = ops.pack_many([matrix], [into], FP8, "row")
    matrix.mul_(-100)
    versions = [buffer._version for buffer in into]
    assert again is not None
    again()
    assert_packed_fp8(matrix, into)
    assert into.scale is not None and into.scale._version > versions[2]
    other = into._replace(scale=torch.zeros(()))
    ops.pack_many([matrix], [other], FP8, "row")
    assert_packed_fp8(matrix, other)
    assert len(packing_many._PLANS) == 2


def test_scales_are_refused_where_they_do_not_belong() -> None:
    matrix = torch.randn(32, 32)
    eight, sixteen = empty_fp8(matrix, "row"), buffers_for(matrix)
    with pytest.raises(TensorError, match=r"buffers\.scale is missing"):
        ops.pack_many([matrix], [sixteen], FP8, "row")
    with pytest.raises(TensorError, match=r"buffers\.scale is given"):
        ops.pack_many([matrix], [eight], BF16, "row")
    with pytest.raises(ConfigError, match="leave scales out"):
        ops.pack_many([matrix], [eight], FP8, "row", None, [torch.ones(())])
