"""The layout of the metadata: encoding and its inverse, sizes of buffers."""

import pytest
import torch

from semisparse.formats.layout import (
    FP8,
    LARGEST_BLOCK,
    READ_TOGETHER,
    SM90_8BIT,
    SM90_16BIT,
    compressed_bytes,
    lengthened,
    packed_bytes,
    round_up,
    sm90_layout,
    sparse_multiple,
)
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


@pytest.mark.parametrize("shape", [(32, 32), (96, 352), (192, 160), (128, 256)], ids=str)
def test_decode_inverts_encode_for_the_bytes_of_8_bit_values(shape):
    scores = torch.randn(shape)
    packed = packing.pack(torch.randint(0, 256, shape).to(torch.uint8), masks.row(scores))
    buffer = SM90_8BIT.encode(packed)
    again = SM90_8BIT.decode(buffer, *shape, torch.uint8)
    assert torch.equal(again.values, packed.values) and torch.equal(again.nibbles, packed.nibbles)
    assert buffer.numel() == SM90_8BIT.buffer_bytes(*shape, 1) == compressed_bytes(*shape, 1)


@pytest.mark.parametrize(
    ("rows", "columns", "size"),
    [
        (32, 32, 1024), (96, 352, 23040), (192, 160, 19968), (4096, 32, 98304), (11008, 4096, 28180480),
    ],
)  # fmt: skip
def test_8_bit_buffers_are_as_long_as_the_library_asks(rows, columns, size):
    """Measured on one H200 with cuSPARSELt 0.8.0."""
    assert compressed_bytes(rows, columns, 1) == size


@pytest.mark.parametrize(("rows", "columns", "itemsize"), [
    (32, 32, 2), (16, 16, 2), (96, 4304, 2), (48, 80, 2), (32, 32, 1), (96, 352, 1), (64, 192, 1), (4096, 11008, 2),
])  # fmt: skip
def test_the_last_row_of_blocks_can_be_read_four_blocks_at_once(rows: int, columns: int, itemsize: int) -> None:
    layout = SM90_8BIT if itemsize == 1 else SM90_16BIT
    down, across = layout.blocks(rows, columns)
    block = layout.block_rows * layout.block_groups // 2
    values = rows * columns * itemsize // 2
    reads = values + (down - 1) * across * block + -(-across // READ_TOGETHER) * READ_TOGETHER * block
    size = packed_bytes(rows, columns, itemsize)
    assert size >= max(reads, compressed_bytes(rows, columns, itemsize))
    if across % READ_TOGETHER == 0:
        assert size == compressed_bytes(rows, columns, itemsize)


@pytest.mark.parametrize(("rows", "columns", "itemsize"), [(32, 32, 2), (48, 80, 2), (32, 32, 1), (96, 352, 1)])
def test_buffers_end_in_padding_from_the_last_metadata_block_on(rows: int, columns: int, itemsize: int) -> None:
    layout = SM90_8BIT if itemsize == 1 else SM90_16BIT
    written = torch.zeros(layout.buffer_bytes(rows, columns, itemsize), dtype=torch.uint8)
    buffer = lengthened(written, rows, columns, itemsize)
    behind = packed_bytes(rows, columns, itemsize) - len(written)
    assert behind > 0
    assert buffer.tolist() == [0] * len(written) + [0xEE] * behind
    blank = torch.zeros_like(buffer)
    assert layout.pad_behind(blank, rows, columns, itemsize) == behind
    assert torch.equal(blank, buffer)


def test_there_is_nothing_to_pad_behind_whole_tiles_and_in_no_buffer() -> None:
    whole = torch.zeros(packed_bytes(128, 256), dtype=torch.uint8)
    assert SM90_16BIT.pad_behind(whole, 128, 256) == SM90_16BIT.pad_behind(whole[:0], 32, 48) == 0
    assert not whole.any()


def test_facts_follow_the_bytes_of_a_value():
    assert (sparse_multiple(torch.bfloat16), sparse_multiple(FP8)) == (16, 32)
    assert (sm90_layout(torch.float16), sm90_layout(FP8)) == (SM90_16BIT, SM90_8BIT)


@pytest.mark.parametrize(
    ("size", "multiple", "expected"), [(0, 16, 0), (1, 16, 16), (16, 16, 16), (13008, 4096, 16384)]
)
def test_sizes_are_rounded_up(size, multiple, expected):
    assert round_up(size, multiple) == expected


@pytest.mark.parametrize("layout", [SM90_16BIT, SM90_8BIT], ids=["16bit", "8bit"])
def test_the_kernel_can_write_the_blocks_of_sm90(layout):
    rows, groups = LARGEST_BLOCK
    assert (rows % layout.block_rows, groups % layout.block_groups) == (0, 0)
