"""Whole launches on a GPU on matrices just above what a grid's y axis, or an offset of 32 bits, reaches.

Each takes 1 to 3 seconds and the memory its name or first comment says. Slices are compared with the reference: the
first rows, those around the limit, the last.
"""

import pytest
import torch

from semisparse.formats import layout
from semisparse.formats.layout import SM90_16BIT, packed_bytes
from semisparse.kernels import bias, prune_pack, tile_codes, unpack
from semisparse.reference import masks, packing

pytestmark = pytest.mark.gpu
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def memory():
    """The GPU may be shared with other workers, so nothing stays in a cache, PyTorch's or the layout's."""
    yield
    layout._addresses.cache_clear()
    torch.cuda.empty_cache()


def packed_both(matrix, dtype):
    """The matrix and its transpose, packed; bytes that nothing writes are 0xA5."""
    rows, columns = matrix.shape
    packed, packed_t = (
        torch.full((packed_bytes(*size),), 0xA5, dtype=torch.uint8, device="cuda")
        for size in ((rows, columns), (columns, rows))
    )
    prune_pack.launch(matrix, packed, packed_t, dtype=dtype, layout=SM90_16BIT)
    return packed, packed_t


def lines(packed, rows, columns, first, count=64):
    """The bytes of whole blocks of rows of a packed rows x columns matrix, as if these rows were the whole."""
    metadata = packed[rows * columns :]
    begin, end = (SM90_16BIT.metadata_bytes(row, columns) for row in (first, first + count))
    return torch.cat([packed[first * columns : (first + count) * columns], metadata[begin:end]])


def expect_packed(packed, matrix, dtype, firsts):
    """packed holds matrix as the reference prunes it, in 64 rows from each of these."""
    for first in firsts:
        part = matrix[first : first + 64].contiguous()
        written = SM90_16BIT.encode(packing.pack(part, masks.transposable(part), dtype))
        assert torch.equal(lines(packed, *matrix.shape, first), written), first


def expect_transposed(packed_t, matrix, dtype, firsts):
    """packed_t holds the transpose, in 64 lines from each of these and as many tokens as there are."""
    rows, columns = matrix.shape
    for first in firsts:
        count = min(64, columns)
        part = matrix[:, first : first + count].contiguous()
        turned = packing.pack(part.mT.contiguous(), masks.transposable(part).mT, dtype)
        assert torch.equal(lines(packed_t, columns, rows, first, count), SM90_16BIT.encode(turned)), first


@pytest.mark.parametrize("rows", [1_048_560, 1_048_560 + 16, 1_048_560 + 17])
def test_bias_behind_65535_blocks_of_rows(rows):
    """0.5 GB."""
    matrix, added = torch.randn(rows, 64, device="cuda").to(BF16), torch.randn(64, device="cuda").to(BF16)
    expected = matrix + added
    bias.launch(matrix, added)
    assert torch.equal(matrix, expected)


@pytest.mark.parametrize("rows", [1_048_560, 1_048_560 + 16])
def test_unpack_behind_65535_blocks_of_rows(rows):
    """1 GB."""
    matrix = torch.randn(rows, 64, device="cuda").to(BF16)
    pruned = packing.pack(matrix, masks.row(matrix))
    out = torch.full_like(matrix, 7.0)
    unpack.launch(SM90_16BIT.encode(pruned), out, layout=SM90_16BIT)
    assert torch.equal(out, packing.unpack(pruned))


@pytest.mark.parametrize("source", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize("rows", [4_194_240, 4_194_304 + 64])
def test_pack_behind_65535_blocks_of_rows(rows, source):
    """2 GB, most of it for the reference's mask of the whole matrix."""
    matrix = torch.randn(rows, 16, device="cuda").to(source)
    packed, packed_t = packed_both(matrix, BF16)
    expect_packed(packed, matrix, BF16, (0, 4_194_240 - 64, rows - 128, rows - 64))
    expect_transposed(packed_t, matrix, BF16, (0,))


def test_tokens_padded_to_more_than_65535_blocks_of_rows():
    """0.5 GB."""
    rows, padded = 4_194_240 + 3, 4_194_240 + 16
    x = torch.randn(rows, 16, device="cuda").to(BF16)
    packed = torch.empty(packed_bytes(padded, 16), dtype=torch.uint8, device="cuda")
    out = torch.empty(padded, 16, dtype=BF16, device="cuda")
    prune_pack.launch(x, packed, None, dtype=BF16, layout=SM90_16BIT, rows_padded=padded)
    unpack.launch(packed, out, layout=SM90_16BIT)
    tail = torch.nn.functional.pad(x[-67:], (0, 0, 0, 13))
    assert torch.equal(out[-80:], torch.where(masks.transposable(tail), tail, 0))


def test_more_than_two_to_the_31_entries():
    """16 GB: the matrix, both results, what is unpacked, and the reference's slices."""
    rows, columns = 2**19 + 64, 4096
    middle = 2**19 - 64  # the 64 rows that end at entry 2^31
    matrix = torch.empty(rows, columns, dtype=BF16, device="cuda").normal_()
    packed, packed_t = packed_both(matrix, BF16)
    expect_packed(packed, matrix, BF16, (0, middle, 2**19))
    expect_transposed(packed_t, matrix, BF16, (0, columns - 64))
    codes = torch.empty(rows // 4, columns // 4, dtype=torch.int16, device="cuda")
    tile_codes.launch(matrix, codes, mask="transposable")
    out = torch.empty_like(matrix)
    unpack.launch(packed, out, layout=SM90_16BIT)
    added = torch.randn(columns, device="cuda").to(BF16)
    for first in (0, middle, 2**19):
        part = matrix[first : first + 64]
        mask = masks.transposable(part)
        assert torch.equal(codes[first // 4 : first // 4 + 16], masks.to_codes(mask).to(torch.int16))
        assert torch.equal(out[first : first + 64], torch.where(mask, part, 0))
    expected = [out[first : first + 64] + added for first in (0, middle, 2**19)]
    bias.launch(out, added)
    for first, part in zip((0, middle, 2**19), expected, strict=True):
        assert torch.equal(out[first : first + 64], part)


def test_rows_further_apart_than_32_bits_reach():
    """17 GB, of which hardly anything is touched: 64 rows, more than 2^31 words of 8 bytes from first to last."""
    apart = 2**27 + 2**22
    spread = torch.empty(63 * apart + 128, dtype=BF16, device="cuda").as_strided((64, 128), (apart, 1))
    spread.copy_(torch.randn(64, 128))
    matrix = spread.contiguous()
    for ours, expected in zip(packed_both(spread, BF16), packed_both(matrix, BF16), strict=True):
        assert torch.equal(ours, expected)
    expect_packed(packed_both(spread, BF16)[0], matrix, BF16, (0,))


@pytest.mark.parametrize("turned", [False, True])
def test_lines_of_a_tile_further_apart_than_32_bits_reach(turned):
    """4 GB: three strides are more than 2^31 entries."""
    apart = 715_827_883
    spread = torch.empty(3 * apart + 64, dtype=BF16, device="cuda").as_strided((4, 64), (apart, 1))
    spread.copy_(torch.randn(4, 64))
    given = spread.mT if turned else spread
    codes = torch.empty(given.shape[0] // 4, given.shape[1] // 4, dtype=torch.int16, device="cuda")
    tile_codes.launch(given, codes, mask="transposable")
    assert torch.equal(codes, masks.to_codes(masks.transposable(given.contiguous())).to(torch.int16))
