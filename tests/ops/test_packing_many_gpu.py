"""pack_many on a GPU: the bytes of pack in one launch, from streams and CUDA graphs."""

import pytest
import torch

from semisparse import ops
from semisparse.errors import EngineError
from semisparse.formats.layout import FP8, PADDING
from semisparse.formats.packed import PackedMatrix
from semisparse.ops import packing_many
from semisparse.testing import assert_bit_equal

# PyTorch warns of a capture that ends with nothing in it.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")]
BF16 = torch.bfloat16
VIT_L = [(3072, 1024), (1024, 1024), (4096, 1024), (1024, 4096)]


def weights(sizes, dtype=BF16):
    return [torch.randn(size, device="cuda").to(dtype) for size in sizes]


def empty_like_packed(matrices, mask="transposable", dtype=BF16):
    return [PackedMatrix(*(torch.full_like(b, PADDING) for b in ops.pack(m, dtype, mask))) for m in matrices]


def assert_packed(matrices, buffers, mask="transposable", dtype=BF16, codes=None, scales=None):
    for at, (matrix, into) in enumerate(zip(matrices, buffers, strict=True)):
        packed = ops.pack(matrix, dtype, mask, codes and codes[at], scales and scales[at])
        for ours, expected in zip(into[:2], packed, strict=True):
            if ours.numel():
                assert_bit_equal(ours, expected)


@pytest.mark.parametrize(("source", "dtype"), [(BF16, BF16), (torch.float32, BF16), (torch.float16, torch.float16)])
def test_the_linears_of_a_vit_in_one_launch(source: torch.dtype, dtype: torch.dtype) -> None:
    matrices = weights(VIT_L * 6, source)
    buffers = empty_like_packed(matrices, dtype=dtype)
    versions = [(into.matrix._version, into.transposed._version) for into in buffers]
    again = ops.pack_many(matrices, buffers, dtype, "transposable")
    assert again is not None
    for turn in range(2):
        assert_packed(matrices, buffers, dtype=dtype)
        now = [(into.matrix._version, into.transposed._version) for into in buffers]
        assert all(
            ours > before for pair in zip(now, versions, strict=True) for ours, before in zip(*pair, strict=True)
        )
        versions = now
        for matrix in matrices:
            matrix.mul_(-0.5).add_(turn)
        again()
    assert_packed(matrices, buffers, dtype=dtype)


@pytest.mark.parametrize("mask", ["row", "soft", "codes"])
def test_other_masks_and_odd_sizes(mask: str) -> None:
    matrices = weights([(16, 16), (48, 80), (1024, 1040), (80, 16)])
    codes = [ops.tile_codes(torch.randn_like(m), "transposable") for m in matrices] if mask == "codes" else None
    scales = [torch.tensor(at + 0.5, device="cuda") for at in range(len(matrices))] if mask == "soft" else None
    name = "transposable" if mask == "codes" else mask
    buffers = [
        PackedMatrix(*(torch.full_like(b, PADDING) for b in ops.pack(m, BF16, name, None, scales and scales[at])))
        for at, m in enumerate(matrices)
    ]
    ops.pack_many(matrices, buffers, BF16, name, codes, scales)
    assert_packed(matrices, buffers, name, codes=codes, scales=scales)


def test_what_the_kernel_cannot_take_is_packed_alone() -> None:
    wide = weights([(64, 144)])[0]
    matrices = [wide[:, :128], wide[:, 1:129], wide[:, ::3], weights([(64, 64)])[0].mT, *weights([(64, 64)])]
    buffers = empty_like_packed(matrices)
    room = torch.zeros(buffers[0].matrix.numel() + 8, dtype=torch.uint8, device="cuda")
    buffers[0] = PackedMatrix(room[8:], buffers[0].transposed)
    assert ops.pack_many(matrices, buffers, BF16, "transposable") is None
    assert_packed(matrices, buffers)
    assert not room[:8].any()


def test_a_graph_captures_the_launch_once_its_table_is_there() -> None:
    matrices = weights(VIT_L)
    buffers = empty_like_packed(matrices)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(EngineError, match="pack them once before the capture"), torch.cuda.graph(graph):
        ops.pack_many(matrices, buffers, BF16, "transposable")
    ops.pack_many(matrices, buffers, BF16, "transposable")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for matrix in matrices:
            matrix.neg_().add_(1)
        ops.pack_many(matrices, buffers, BF16, "transposable")
    packing_many._PLANS.clear()  # the graph keeps its table
    for _ in range(3):
        graph.replay()
        assert_packed(matrices, buffers)


def test_a_backward_that_saved_older_bytes_raises() -> None:
    matrices = weights([(64, 128)])
    buffers = empty_like_packed(matrices)
    ops.pack_many(matrices, buffers, BF16, "transposable")
    x = torch.randn(8, 128, device="cuda", requires_grad=True)
    y = x * buffers[0].matrix[:128]
    ops.pack_many(matrices, buffers, BF16, "transposable")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_default_device_does_not_matter() -> None:
    matrices = weights([(64, 128)])
    buffers = empty_like_packed(matrices)
    with torch.device("cuda"):
        ops.pack_many(matrices, buffers, BF16, "transposable")
    assert_packed(matrices, buffers)


@pytest.mark.parametrize("mask", ["transposable", "row", "codes"])
@pytest.mark.parametrize("source", [BF16, torch.float16, torch.float32], ids=str)
def test_in_e4m3_the_bytes_and_scales_are_those_of_pack_fp8(source: torch.dtype, mask: str) -> None:
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("fp8 needs capability 8.9")
    matrices = weights([*VIT_L, (32, 32), (96, 352), (1056, 160)], source)
    codes = [ops.tile_codes(torch.randn_like(m), "transposable") for m in matrices] if mask == "codes" else None
    name = "transposable" if mask == "codes" else mask
    buffers = [
        PackedMatrix(*(torch.full_like(b, PADDING) for b in ops.pack_fp8(matrix, name, None))) for matrix in matrices
    ]
    again = ops.pack_many(matrices, buffers, FP8, name, codes)
    assert again is not None
    for _ in range(2):
        for at, (matrix, into) in enumerate(zip(matrices, buffers, strict=True)):
            packed = ops.pack_fp8(matrix, name, codes and codes[at])
            for ours, expected in zip(into[:2], packed[:2], strict=True):
                if ours.numel():
                    assert_bit_equal(ours, expected)
            assert_bit_equal(into.scale, packed[2])
            matrix.mul_(-3).add_(at)
        again()
