"""The layout of the metadata: encoding and its inverse, sizes of buffers."""

import pytest
import torch

from semisparse.formats.layout import LARGEST_BLOCK, SM90_8BIT, SM90_16BIT, packed_bytes, round_up
from semisparse.reference import masks, packing


@pytest.mark.parametrize("layout", [SM90_16BIT, SM90_8BIT], ids=["16bit", "8bit"])
@pytest.mark.parametrize("shape", [(16, 16), (48, 80), (80, 336), (128, 256)], ids=str)
def test_decode_inverts_encode_and_the_buffer_is_large_enough(layout, shape):
    matrix = torch.randn(shape).bfloat16()
    packed = packing.pack(matrix, masks.row(matrix))
    buffer = layout.encode(packed)
    again = layout.decode(buffer, *shape, torch.bfloat16)
    assert torch.equal(again.values, packed.values) and torch.equal(again.nibbles, packed.nibbles)
    assert buffer.numel() == layout.buffer_bytes(*shape)
    if layout is SM90_16BIT:
        assert buffer.numel() <= packed_bytes(*shape)


@pytest.mark.parametrize(
    ("size", "multiple", "expected"), [(0, 16, 0), (1, 16, 16), (16, 16, 16), (13008, 4096, 16384)]
)
def test_sizes_are_rounded_up(size, multiple, expected):
    assert round_up(size, multiple) == expected


def test_the_kernel_can_write_the_blocks_of_sm90():
    rows, groups = LARGEST_BLOCK
    assert (rows % SM90_16BIT.block_rows, groups % SM90_16BIT.block_groups) == (0, 0)
