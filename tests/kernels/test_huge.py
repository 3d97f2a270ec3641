"""Programs at the end of launches that no test can run whole: flat grids, and offsets that need 64 bits."""

import pytest
import torch

from semisparse.formats.layout import SM90_16BIT, packed_bytes
from semisparse.kernels import (
    amax,
    bias,
    grid,
    kept_values,
    prune_pack,
    prune_pack8,
    quantise,
    rescale,
    tile_codes,
    unpack,
)
from semisparse.kernels.prune_pack import HOPPER_BLOCK
from semisparse.reference import fp8, masks, packing
from tests.kernels import (
    test_bias,
    test_kept_values,
    test_prune_pack,
    test_prune_pack8,
    test_quantise,
    test_rescale,
    test_unpack,
)
from tests.kernels.programs import only_programs, untouched

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="single programs need Triton's interpreter; test_huge_gpu.py runs whole launches"
)
BF16 = torch.bfloat16


@pytest.fixture
def flat(monkeypatch):
    """Every grid of more than one row of blocks is flat."""
    monkeypatch.setattr(grid, "LIMITS", (2**31 - 1, 1, 1))
    for kernel in (bias, kept_values, unpack, prune_pack, prune_pack8, quantise, rescale):
        kernel._prepare.cache_clear()
    yield
    for kernel in (bias, kept_values, unpack, prune_pack, prune_pack8, quantise, rescale):
        kernel._prepare.cache_clear()


@pytest.mark.usefixtures("flat")
@pytest.mark.parametrize("shape", [(33, 528), (48, 1040)], ids=str)
def test_a_flat_grid_adds_the_same_bias(shape):
    test_bias.test_it_adds_as_pytorch_does(torch.float16, shape)


@pytest.mark.usefixtures("flat")
@pytest.mark.parametrize("shape", [(80, 336), (48, 528)], ids=str)
def test_a_flat_grid_unpacks_the_same(shape):
    test_unpack.test_unpack_is_exact(BF16, shape, "sm90")


@pytest.mark.usefixtures("flat")
def test_a_flat_grid_moves_the_same_kept_values():
    test_kept_values.test_both_ways_move_bits(BF16, (36, 264), masks.transposable)


@pytest.mark.usefixtures("flat")
def test_a_flat_grid_packs_the_same():
    test_prune_pack.test_transposable_is_the_reference_byte_for_byte(BF16, (80, 144))


@pytest.mark.usefixtures("flat")
def test_a_flat_grid_packs_and_unpacks_the_same_8_bit_values():
    test_prune_pack8.test_both_buffers_are_the_reference_byte_for_byte(BF16, (96, 352))
    test_prune_pack8.test_unpack_is_exact((96, 352), "sm90")


@pytest.mark.usefixtures("flat")
def test_a_flat_grid_pads_and_takes_codes_and_shrinks():
    test_prune_pack.test_rows_are_padded_with_zeros(71)
    test_prune_pack.test_codes_apply_a_given_mask()
    test_prune_pack.test_soft_shrinks_the_kept_two(BF16)


@pytest.mark.usefixtures("flat")
def test_a_flat_grid_rounds_and_rescales_the_same():
    test_quantise.test_codes_and_scale_are_the_specification((300, 288), BF16)
    test_rescale.test_it_is_the_formula((33, 528), True, torch.float32, BF16)


@pytest.mark.parametrize("columns", [16, 528])
def test_the_bias_reaches_the_rows_behind_the_first_65535_blocks(columns):
    rows, blocks = 1_048_560 + 17, -(-columns // 512)
    matrix, added = untouched((rows, columns), torch.float16), torch.randn(columns).half()
    with only_programs(*((block, 0) for block in (0, 65_535 * blocks, 65_537 * blocks - 1))):
        bias.launch(matrix, added)
    assert torch.equal(matrix[1_048_560, : min(columns, 512)], added[:512])
    assert torch.equal(matrix[-1, -16:], added[-16:])
    assert bool((matrix[16:1_048_560] == 0).all())


def test_unpacking_reaches_the_rows_behind_the_first_65535_blocks():
    rows = 1_048_560 + 16
    matrix = torch.randn(rows, 16).half()
    pruned = packing.pack(matrix, masks.row(matrix))
    out = untouched((rows, 16), torch.float16)
    with only_programs((0, 0), (65_534, 0), (65_535, 0)):
        unpack.launch(SM90_16BIT.encode(pruned), out, layout=SM90_16BIT)
    assert torch.equal(out[:16], packing.unpack(pruned)[:16])
    assert torch.equal(out[-32:], packing.unpack(pruned)[-32:])
    assert bool((out[16:-32] == 0).all())


def packed_rows(packed, rows, columns, first):
    """The bytes of 64 rows of a packed matrix, as if these rows were the whole."""
    metadata = packed[rows * columns :]
    each = SM90_16BIT.metadata_bytes(64, columns)
    part = metadata[first // 64 * each : (first // 64 + 1) * each]
    return torch.cat([packed[first * columns : (first + 64) * columns], part])


def test_packing_reaches_the_rows_behind_the_first_65535_blocks():
    rows, columns = 4_194_240 + 128, 80
    matrix = untouched((rows, columns), BF16)
    packed, packed_t = (untouched((packed_bytes(*size),), torch.uint8) for size in ((rows, columns), (columns, rows)))
    last = slice(rows - 64, rows)
    matrix[last] = torch.randn(64, columns).to(BF16)
    with only_programs((2 * 65_536, 0), (2 * 65_536 + 1, 0)):
        prune_pack.launch(matrix, packed, packed_t, dtype=BF16, layout=SM90_16BIT)
    mask = masks.transposable(matrix[last])
    expected = packing.pack(matrix[last], mask)
    assert torch.equal(packed_rows(packed, rows, columns, rows - 64), SM90_16BIT.encode(expected))
    found = packed_t[: rows * columns].view(BF16).view(columns, rows // 2)[:, -32:]
    turned = packing.pack(matrix[last].mT, mask.mT)
    assert torch.equal(found, turned.values)
    nibbles = packed_t[rows * columns : rows * columns + SM90_16BIT.metadata_bytes(columns, rows)].view(2, -1, 256)
    blocks = SM90_16BIT.encode(turned)[turned.values.nbytes :].view(2, 2, 256)
    assert torch.equal(nibbles[:, -2:], blocks)


def test_rows_that_lie_further_apart_than_32_bits_reach_are_packed():
    apart = 2**27 + 2**22  # row 63 begins more than 2^31 words of 8 bytes behind row 0
    spread = untouched((63 * apart + 64,), BF16).as_strided((64, 64), (apart, 1))
    spread.copy_(torch.randn(64, 64))
    matrix, both = spread.contiguous(), []
    for given in (spread, matrix):
        packed = test_prune_pack.buffers(64, 64)
        with only_programs((0, 0)):
            prune_pack.launch(given, *packed, dtype=BF16, layout=SM90_16BIT)
        both.append(packed)
    assert torch.equal(both[0][0], both[1][0]) and torch.equal(both[0][1], both[1][1])
    test_prune_pack.expect(both[0][0], matrix, masks.transposable(matrix), BF16)


def test_rows_that_lie_further_apart_than_32_bits_reach_are_packed_as_8_bit_values():
    apart = 2**27 + 2**22
    spread = untouched((63 * apart + 64,), BF16).as_strided((64, 64), (apart, 1))
    spread.copy_(torch.randn(64, 64))
    both = test_prune_pack8.pack(spread, fp8.largest_magnitude(spread.contiguous()))
    matrix = spread.contiguous()
    test_prune_pack8.expect_both(both, test_prune_pack8.codes_of(matrix), masks.transposable(matrix))


def test_lines_of_the_transpose_further_apart_than_32_bits_reach_are_packed():
    rows, columns = 2**27 + 2**23, 64  # line 63 of the transpose begins more than 2^31 words of 4 bytes behind line 0
    matrix = untouched((rows, columns), BF16)
    packed, packed_t = (untouched((packed_bytes(*size),), torch.uint8) for size in ((rows, columns), (columns, rows)))
    matrix[:64] = torch.randn(64, columns).to(BF16)
    with only_programs((0, 0)):
        prune_pack.launch(matrix, packed, packed_t, dtype=BF16, layout=SM90_16BIT)
    mask = masks.transposable(matrix[:64])
    found = packed_t[: rows * columns].view(BF16).view(columns, rows // 2)[:, :32]
    assert torch.equal(found, packing.pack(matrix[:64].mT, mask.mT).values)


@pytest.mark.parametrize("turned", [False, True])
def test_tiles_whose_lines_lie_further_apart_than_32_bits_reach_are_chosen(turned):
    apart = 715_827_883  # three times this is more than 2^31
    spread = untouched((3 * apart + 16,), BF16).as_strided((4, 16), (apart, 1))
    spread.copy_(torch.randn(4, 16))
    given = spread.mT if turned else spread
    codes = torch.zeros(given.shape[0] // 4, given.shape[1] // 4, dtype=torch.int16)
    with only_programs((0, 0)):
        tile_codes.launch(given, codes, mask="transposable")
    assert torch.equal(codes, masks.to_codes(masks.transposable(given.contiguous())).to(torch.int16))


def test_a_matrix_of_more_than_two_to_the_31_entries_gets_its_bias_up_to_its_last_row():
    rows, columns = 2**20 + 16, 4096
    matrix, added = untouched((rows, columns), torch.float16), torch.randn(columns).half()
    with only_programs((65_537 * 8 - 1, 0)):
        bias.launch(matrix, added)
    assert torch.equal(matrix[-1, -512:], added[-512:])


def test_a_matrix_of_more_than_two_to_the_31_groups_is_unpacked_up_to_its_last_row():
    rows, columns = 2**21 + 16, 4096
    packed, out = untouched((packed_bytes(rows, columns),), torch.uint8), untouched((rows, columns), torch.float16)
    last = torch.randn(16, columns).half()
    pruned = packing.pack(last, masks.row(last))
    written, values = SM90_16BIT.encode(pruned), rows * columns
    packed[values - 16 * columns : values] = written[: 16 * columns]
    behind = values + SM90_16BIT.metadata_bytes(rows - 16, columns)
    packed[behind : behind + written.numel() - 16 * columns] = written[16 * columns :]
    with only_programs((131_073 * 16 - 1, 0)):
        unpack.launch(packed, out, layout=SM90_16BIT)
    assert torch.equal(out[-16:, -256:], packing.unpack(pruned)[:, -256:])


def test_a_matrix_of_more_than_two_to_the_31_words_is_packed_up_to_its_last_row():
    rows, columns = 2**21 + 2**17, 4096  # the transpose's last program begins 2^31 words of 4 bytes behind its first
    matrix = untouched((rows, columns), BF16)
    packed, packed_t = (untouched((packed_bytes(*size),), torch.uint8) for size in ((rows, columns), (columns, rows)))
    part = matrix[-64:, -64:]
    part.copy_(torch.randn(64, 64))
    with only_programs((63, rows // 64 - 1)):
        prune_pack.launch(matrix, packed, packed_t, dtype=BF16, layout=SM90_16BIT)
    mask = masks.transposable(part)
    last_block(packed, rows, columns, packing.pack(part, mask))
    last_block(packed_t, columns, rows, packing.pack(part.mT, mask.mT))


def last_block(packed, rows, columns, expected):
    """The last 64 rows and columns of a packed matrix: values, and the last two blocks of metadata."""
    assert torch.equal(packed[: rows * columns].view(BF16).view(rows, columns // 2)[-64:, -32:], expected.values)
    end = rows * columns + SM90_16BIT.metadata_bytes(rows, columns)
    assert torch.equal(packed[end - 512 : end], SM90_16BIT.encode(expected)[expected.values.nbytes :])


def test_more_than_two_to_the_31_codes_are_followed_up_to_the_last():
    rows, columns = 2**19 + 64, 2**16
    matrix, codes = untouched((rows, columns), BF16), untouched((rows // 4, columns // 4), torch.int16)
    packed = untouched((packed_bytes(rows, columns),), torch.uint8)
    part = matrix[-64:, -64:]
    part.copy_(torch.randn(64, 64))
    mask = masks.transposable(torch.randn(64, 64))
    codes[-16:, -16:] = masks.to_codes(mask).to(torch.int16)
    with only_programs((1023, 8192)):
        prune_pack.launch(matrix, packed, None, dtype=BF16, layout=SM90_16BIT, codes=codes)
    last_block(packed, rows, columns, packing.pack(part, mask))


def test_metadata_of_the_transpose_further_apart_than_32_bits_reach():
    rows, columns = (
        2**30 + 2**26,
        128,
    )  # a program of Hopper's block writes two rows of metadata blocks of the transpose
    matrix = untouched((rows, columns), BF16)
    packed, packed_t = (untouched((packed_bytes(*size),), torch.uint8) for size in ((rows, columns), (columns, rows)))
    part = matrix[:64]
    part.copy_(torch.randn(64, columns))
    with only_programs((0, 0)):
        prune_pack.launch(matrix, packed, packed_t, dtype=BF16, layout=SM90_16BIT, block=HOPPER_BLOCK)
    expected = SM90_16BIT.encode(packing.pack(part.mT, masks.transposable(part).mT))[64 * columns :].view(2, 512)
    for lines in range(2):
        begin = rows * columns + SM90_16BIT.metadata_bytes(64 * lines, rows)
        assert torch.equal(packed_t[begin : begin + 512], expected[lines])


def test_the_last_codes_of_a_transpose_whose_lines_lie_further_apart_than_32_bits_reach():
    columns, height = quantise.BLOCK.columns, 4 * quantise.BLOCK.fours
    rows = 2**33 // columns + 112  # a program's lines, of a quarter of as many words, reach over 2^31 words
    x = untouched((rows, columns), BF16)
    x8, x8t = (untouched(size, torch.uint8) for size in ((rows, columns), (columns, rows)))
    first = (rows - 1) // height * height
    x[first:] = torch.randn(rows - first, columns)
    with only_programs((rows // height, 0)):
        quantise.launch(x, torch.tensor([0x43800000], dtype=torch.int32), x8, x8t, torch.empty(()))
    codes = fp8.quantise(x[first:], torch.tensor(1.0)).view(torch.uint8)
    assert torch.equal(x8[first:], codes) and torch.equal(x8t[:, first:], codes.mT)


def test_rows_that_lie_further_apart_than_32_bits_reach_are_rounded():
    apart, height = 2**25, 4 * quantise.BLOCK.fours  # the last row of a program begins 2^31 numbers behind its first
    spread = untouched((height * apart + 32,), torch.float32).as_strided((height + 1, 32), (apart, 1))
    spread.copy_(torch.randn(height + 1, 32))
    test_quantise.assert_as_specified(spread)
    assert amax.is_readable(spread)
