"""The packed format byte for byte, typed from what NVIDIA's compressor was measured to write (cuSPARSELt 0.8.0, sm90).

Nothing here is computed by, or compared with, the project's own tables: a table that is wrong everywhere alike would
pass every other test. Low address bit first, the bits of a nibble's address are

    16-bit types   row3 g2 g0 g1 row0 row1 row2 row4 row5 g3 g4 ..., then row6 ...
    8-bit types    g0 row3 g3 g1 g2 row0 row1 row2 row4 row5 g4 g5 ..., then row6 ...

for the group of four g of a row, and a nibble is first kept index | second kept index << 2.
"""

import pytest
import torch

from semisparse.formats.layout import SM90_8BIT, SM90_16BIT, MetadataLayout, compressed_bytes
from semisparse.kernels import prune_pack, prune_pack8, unpack
from semisparse.reference import packing

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BF16 = torch.bfloat16
LAYOUT = MetadataLayout((3, 34, 32, 33, 0, 1, 2, 4, 5), 0xE)  # typed here, not taken from the library
LAYOUT_8 = MetadataLayout((32, 3, 35, 33, 34, 0, 1, 2, 4, 5), 0xE)

# In a matrix whose groups keep their first two entries (nibble 4), one group that keeps its last two (nibble E):
# row, group, the one byte of the metadata that this changes from 0x44, and what it becomes.
ONE_GROUP_16 = [
    (0, 0, 0, 0x4E),
    (8, 0, 0, 0xE4),
    (0, 4, 1, 0x4E),
    (0, 1, 2, 0x4E),
    (0, 2, 4, 0x4E),
    (1, 0, 8, 0x4E),
    (2, 0, 16, 0x4E),
    (4, 0, 32, 0x4E),
    (16, 0, 64, 0x4E),
    (32, 0, 128, 0x4E),
    (0, 8, 256, 0x4E),
    (64, 0, 512, 0x4E),
    (21, 6, 109, 0x4E),
    (63, 7, 255, 0xE4),
    (75, 13, 795, 0xE4),
    (127, 15, 1023, 0xE4),
]
ONE_GROUP_8 = [
    (0, 0, 0, 0x4E),
    (0, 1, 0, 0xE4),
    (8, 0, 1, 0x4E),
    (0, 8, 2, 0x4E),
    (0, 2, 4, 0x4E),
    (0, 4, 8, 0x4E),
    (1, 0, 16, 0x4E),
    (2, 0, 32, 0x4E),
    (4, 0, 64, 0x4E),
    (16, 0, 128, 0x4E),
    (32, 0, 256, 0x4E),
    (0, 16, 512, 0x4E),
    (64, 0, 1024, 0x4E),
    (127, 31, 2047, 0xE4),
]


def one_group(row, group, columns=64):
    """128 rows that keep 1 and 2, in one group 3 and 4."""
    matrix = torch.tensor([1.0, 2.0, 0.0, 0.0]).repeat(128, columns // 4)
    matrix[row, 4 * group : 4 * group + 4] = torch.tensor([0.0, 0.0, 3.0, 4.0])
    return matrix.to(DEVICE)


def one_group_bytes(row, group, byte, value, dtype):
    """What one_group packs into, 64 columns."""
    first, second, third, fourth = {
        BF16: ("803f", "0040", "4040", "8040"),
        torch.float16: ("003c", "0040", "0042", "0044"),
    }[dtype]
    values = bytearray(bytes.fromhex(first + second) * (128 * 16))
    values[64 * row + 4 * group : 64 * row + 4 * group + 4] = bytes.fromhex(third + fourth)
    metadata = bytearray(b"\x44" * 1024)
    metadata[byte] = value
    return tensor(values + metadata)


def tensor(content):
    return torch.frombuffer(bytearray(content), dtype=torch.uint8).to(DEVICE)


def packed_by_kernel(matrix, mask, dtype=BF16, turned=False):
    rows, columns = matrix.shape
    buffers = [torch.zeros(rows * columns * 9 // 8 + 4096, dtype=torch.uint8, device=DEVICE) for _ in range(1 + turned)]
    packed_t = buffers[1] if turned else None
    prune_pack.launch(matrix, buffers[0], packed_t, dtype=dtype, layout=LAYOUT, mask=mask)
    return buffers


@pytest.mark.parametrize("dtype", [torch.float16, BF16], ids=str)
@pytest.mark.parametrize(("row", "group", "byte", "value"), ONE_GROUP_16)
def test_each_bit_of_a_16_bit_address(row, group, byte, value, dtype):
    matrix, golden = one_group(row, group), one_group_bytes(row, group, byte, value, dtype)
    assert torch.equal(SM90_16BIT.encode(packing.pack(matrix, matrix != 0, dtype)), golden)
    decoded = SM90_16BIT.decode(golden, 128, 64, dtype)
    assert torch.equal(packing.unpack(decoded), matrix.to(dtype))


@pytest.mark.parametrize(("row", "group", "byte", "value"), ONE_GROUP_16)
def test_the_kernels_write_and_read_these_bytes(row, group, byte, value):
    matrix, golden = one_group(row, group), one_group_bytes(row, group, byte, value, BF16)
    packed = packed_by_kernel(matrix, "row")[0]
    assert torch.equal(packed[: golden.numel()], golden)
    out = torch.empty(128, 64, dtype=BF16, device=DEVICE)
    unpack.launch(golden, out, layout=LAYOUT)
    assert torch.equal(out, matrix.to(BF16))


@pytest.mark.parametrize(("row", "group", "byte", "value"), ONE_GROUP_8)
def test_each_bit_of_an_8_bit_address(row, group, byte, value):
    matrix = one_group(row, group, columns=128).to(BF16)
    written = SM90_8BIT.encode(packing.pack(matrix, matrix != 0))
    golden = bytearray(b"\x44" * 2048)
    golden[byte] = value
    assert torch.equal(written[128 * 128 :], tensor(golden))


@pytest.mark.parametrize(("row", "group", "byte", "value"), ONE_GROUP_8[::2])
def test_the_kernels_write_and_read_these_8_bit_bytes(row, group, byte, value):
    """With a multiplier of 1; 1, 2, 3 and 4 are 38, 40, 44 and 48."""
    values = bytearray(b"\x38\x40" * (128 * 32))
    values[64 * row + 2 * group : 64 * row + 2 * group + 2] = b"\x44\x48"
    golden = bytearray(b"\x44" * 2048)
    golden[byte] = value
    matrix, golden = one_group(row, group, columns=128), tensor(values + golden)
    packed = torch.zeros_like(golden)
    largest = torch.tensor(448.0, device=DEVICE).view(torch.int32)
    prune_pack8.launch(matrix, largest, packed, None, layout=LAYOUT_8, mask="row")
    assert torch.equal(packed, golden)
    out = torch.empty(128, 128, dtype=torch.float8_e4m3fn, device=DEVICE)
    unpack.launch(golden, out, layout=LAYOUT_8)
    assert torch.equal(out.float(), matrix)


def test_both_directions_of_a_matrix_of_tiles_in_8_bits():
    """As the test below, of 128 x 128: the metadata alternate between 32 bytes of 0x44 and 32 of 0xEE."""
    tile = torch.block_diag(torch.ones(2, 2), torch.ones(2, 2))
    matrix = tile.repeat(32, 32)
    matrix[84:88, 52:56] = 1 - tile
    packed = [torch.zeros(128 * 128 // 2 + 2048, dtype=torch.uint8, device=DEVICE) for _ in range(2)]
    largest = torch.tensor(448.0, device=DEVICE).view(torch.int32)
    prune_pack8.launch(matrix.to(DEVICE), largest, *packed, layout=LAYOUT_8)
    for buffer, first in zip(packed, (1226, 968), strict=True):
        metadata = bytearray((b"\x44" * 32 + b"\xee" * 32) * 32)
        for k, byte in enumerate((0xE4, 0xE4, 0x4E, 0x4E)):
            metadata[first + 16 * k] = byte
        assert torch.equal(buffer, tensor(b"\x38" * 8192 + metadata))


# Tiles that keep their upper left and lower right quarter, and at tile (21, 13) the two others: the metadata alternate
# between 16 bytes of 0x44 (rows 0 and 1 of a tile) and 16 of 0xEE, but for four bytes per direction.
ONE_TILE = {867: 0x4E, 875: 0x4E, 883: 0xE4, 891: 0xE4}
ONE_TILE_TURNED = {739: 0x4E, 747: 0x4E, 755: 0xE4, 763: 0xE4}


@pytest.mark.parametrize("source", [torch.float32, torch.float16, BF16], ids=str)
def test_both_directions_of_a_matrix_of_tiles(source):
    tile = torch.block_diag(torch.ones(2, 2), torch.ones(2, 2))
    matrix = tile.repeat(32, 16)
    matrix[84:88, 52:56] = 1 - tile
    packed = packed_by_kernel(matrix.to(DEVICE, source), "transposable", turned=True)
    for buffer, changed in zip(packed, (ONE_TILE, ONE_TILE_TURNED), strict=True):
        metadata = bytearray((b"\x44" * 16 + b"\xee" * 16) * 32)
        for byte, value in changed.items():
            metadata[byte] = value
        golden = tensor(b"\x80\x3f" * 4096 + metadata)
        assert torch.equal(buffer[: golden.numel()], golden)


def test_what_fills_up_a_block_is_what_the_compressor_stores_for_a_group_of_zeros():
    """16 x 16 in a block of 64 rows x 8 groups: 4 of 8 groups and 48 of 64 rows are padding."""
    matrix = torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=BF16, device=DEVICE).repeat(16, 4)
    golden = tensor(bytes.fromhex("803f" * 128 + "44ee" * 32 + "eeee" * 96))
    assert torch.equal(SM90_16BIT.encode(packing.pack(matrix, matrix != 0)), golden)
    assert torch.equal(packed_by_kernel(matrix, "row")[0][: golden.numel()], golden)
    assert MetadataLayout((0, 32)).padding == 0xE
    assert (SM90_16BIT.padding, SM90_8BIT.padding) == (0xE, 0xE)


def test_the_compressor_asks_for_this_many_bytes():
    assert compressed_bytes(48, 80) == 3840 + 1024
    assert compressed_bytes(128, 64) == 128 * 64 + 1024
