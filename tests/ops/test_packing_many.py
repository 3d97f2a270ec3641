"""pack_many: the bytes of pack, in buffers that stay where they are."""

import pytest
import torch

from semisparse import ops
from semisparse.formats.packed import PackedMatrix
from semisparse.testing import assert_bit_equal

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
