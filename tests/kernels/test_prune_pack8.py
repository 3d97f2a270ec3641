"""The pack kernel for e4m3 against the reference: on the CPU through Triton's interpreter, on a GPU as it is."""

import pytest
import torch

from semisparse.errors import ConfigError, ShapeError, TensorError
from semisparse.formats.layout import FP8, SM90_8BIT, MetadataLayout
from semisparse.kernels import prune_pack8, unpack
from semisparse.kernels.prune_pack import Block
from semisparse.reference import fp8, masks, packing

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EACH_DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)  # fp16: every number, below
SHAPES = [(32, 32), (64, 96), (96, 160)]
LAYOUTS = {"sm90": SM90_8BIT, "other": MetadataLayout((32, 1, 0, 33, 2, 34, 3, 4))}
SMALLEST = Block(tile_rows=16, pairs=8, warps=1, registers=None)
UNTOUCHED = 0xA5


def buffer_for(rows, columns, layout=SM90_8BIT):
    return torch.full(
        (layout.buffer_bytes(rows, columns, itemsize=1) + 32,), UNTOUCHED, dtype=torch.uint8, device=DEVICE
    )


def pack(matrix, largest=None, mask="transposable", layout=SM90_8BIT, written=(True, True), **kwargs):
    """Both buffers; largest: fp32, of the matrix where it is not given."""
    largest = fp8.largest_magnitude(matrix) if largest is None else largest
    rows, columns = matrix.shape
    packed = buffer_for(rows, columns, layout) if written[0] else None
    packed_t = buffer_for(columns, rows, layout) if written[1] and mask != "row" else None
    prune_pack8.launch(matrix, largest.view(torch.int32), packed, packed_t, layout=layout, mask=mask, **kwargs)
    return packed, packed_t


def codes_of(matrix, largest=None):
    """The e4m3 codes (uint8) of the whole matrix."""
    largest = fp8.largest_magnitude(matrix) if largest is None else largest
    return fp8.quantise(matrix, fp8.multiplier_for(largest)).view(torch.uint8)


def expect(buffer, quantised, mask, layout=SM90_8BIT):
    """buffer holds quantised (uint8) with mask, byte for byte, and what lies behind the last block is untouched."""
    written = layout.encode(packing.pack(quantised, mask))
    assert torch.equal(buffer[: written.numel()], written)
    assert bool((buffer[written.numel() :] == UNTOUCHED).all()) and buffer.numel() > written.numel()


def expect_both(buffers, quantised, mask, layout=SM90_8BIT):
    expect(buffers[0], quantised, mask, layout)
    expect(buffers[1], quantised.mT, mask.mT, layout)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@EACH_DTYPE
def test_both_buffers_are_the_reference_byte_for_byte(dtype, shape):
    matrix = torch.randn(shape, device=DEVICE).to(dtype)
    expect_both(pack(matrix), codes_of(matrix), masks.transposable(matrix))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@EACH_DTYPE
def test_row_keeps_the_two_largest_of_a_row(dtype, shape):
    matrix = torch.randn(shape, device=DEVICE).to(dtype)
    expect(pack(matrix, mask="row")[0], codes_of(matrix), masks.row(matrix))


def test_codes_apply_a_given_mask():
    matrix, other = torch.randn(96, 160, device=DEVICE), torch.randn(96, 160, device=DEVICE)
    mask = masks.transposable(other)
    expect_both(pack(matrix, codes=masks.to_codes(mask).to(torch.int16)), codes_of(matrix), mask)


def test_the_mask_is_chosen_on_what_is_not_rounded_yet():
    """Of values that all have one code, the largest are kept."""
    matrix = 1 + torch.rand(64, 64, device=DEVICE) / 32
    quantised = codes_of(matrix)
    assert quantised.unique().numel() == 1
    expect_both(pack(matrix), quantised, masks.transposable(matrix))


@EACH_DTYPE
def test_ties_follow_the_reference(dtype):
    matrix = torch.randint(-2, 3, (64, 128), device=DEVICE).to(dtype)
    expect_both(pack(matrix), codes_of(matrix), masks.transposable(matrix))
    expect(pack(matrix, mask="row")[0], codes_of(matrix), masks.row(matrix))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_16_bit_number_is_rounded_as_the_reference_says(dtype):
    """With a multiplier of 1: subnormal codes, halves, what is beyond 448, Inf and NaN."""
    matrix = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).view(256, 256).to(DEVICE)
    matrix = torch.where(matrix.isnan(), torch.nan, matrix)  # the interpreter warns of signalling ones
    largest = torch.tensor(448.0, device=DEVICE)
    expect(pack(matrix, largest, "row")[0], codes_of(matrix, largest), masks.row(matrix))


def test_fp32_numbers_near_a_half_are_rounded_to_even():
    numbers = fp8.decode(torch.arange(0x7F, dtype=torch.uint8))
    halves = (numbers[1:] + numbers[:-1]) / 2
    near = torch.stack([halves, halves.nextafter(torch.tensor(0.0)), halves.nextafter(torch.tensor(1e9)), numbers[1:]])
    matrix = torch.nn.functional.pad(near.mT, (0, 28, 0, 2)).to(DEVICE)
    matrix[::2] *= -1
    largest = torch.tensor(448.0, device=DEVICE)
    for kept in ([1, 1, 0, 0], [0, 0, 1, 1]):
        tile = torch.tensor([kept, kept, kept[::-1], kept[::-1]], dtype=torch.bool, device=DEVICE)
        mask = tile.repeat(32, 8)
        packed = pack(matrix, largest, codes=masks.to_codes(mask).to(torch.int16))
        expect_both(packed, codes_of(matrix, largest), mask)


@EACH_DTYPE
def test_nan_infinity_negative_zero_and_groups_of_zeros(dtype):
    matrix = torch.randn(64, 64, device=DEVICE).to(dtype)
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 0.0], device=DEVICE).to(dtype)
    at = torch.randint(0, 64 * 64, (900,), device=DEVICE)
    matrix.view(-1)[at] = special[torch.arange(900, device=DEVICE) % 5]
    matrix[8:16, 8:24] = 0
    matrix[20:24, 20:24] = -0.0
    largest = torch.tensor(3.0, device=DEVICE)
    expect_both(pack(matrix, largest), codes_of(matrix, largest), masks.transposable(matrix))
    expect(pack(matrix, largest, "row")[0], codes_of(matrix, largest), masks.row(matrix))


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_largest_magnitude_that_is_not_finite_makes_every_value_nan(bad):
    matrix = torch.randn(32, 64, device=DEVICE)
    matrix[3, 3] = bad
    scale = torch.zeros((), device=DEVICE)
    packed, packed_t = pack(matrix, scale=scale)
    assert scale.isnan()
    for buffer in (packed, packed_t):
        assert bool((buffer[: 32 * 64 // 2] == fp8.NAN).all())
    expect_both((packed, packed_t), codes_of(matrix), masks.transposable(matrix))


@pytest.mark.parametrize("largest", [0.0, 1e-45, 1e-30, 1.0, 1.75, 1.7500001, 448.0, 3e38])
def test_the_scale_is_the_inverse_of_the_multiplier(largest):
    matrix = torch.randn(64, 32, device=DEVICE).clamp(-1, 1) * (largest / 16)  # sums of a tile's scores are finite
    scale, given = torch.zeros((), device=DEVICE), torch.tensor(largest, device=DEVICE)
    packed = pack(matrix, given, scale=scale)
    assert scale == 1 / fp8.multiplier_for(given)
    expect_both(packed, codes_of(matrix, given), masks.transposable(matrix))


@pytest.mark.parametrize("count", [2, 3, 33])
def test_of_several_largest_magnitudes_the_largest_counts(count):
    matrix = torch.randn(32, 96, device=DEVICE)
    partial = matrix.flatten()[:: -(-matrix.numel() // count)].abs() * 1e-3
    partial[-1] = fp8.largest_magnitude(matrix)
    assert partial.numel() == count
    expect_both(pack(matrix, partial), codes_of(matrix), masks.transposable(matrix))


@EACH_DTYPE
def test_each_buffer_alone_has_the_bytes_of_both(dtype):
    matrix = torch.randn(32, 96, device=DEVICE).to(dtype)
    both = pack(matrix)
    assert torch.equal(pack(matrix, written=(True, False))[0], both[0])
    assert torch.equal(pack(matrix, written=(False, True))[1], both[1])


@pytest.mark.parametrize("block", [SMALLEST, Block(32, 16, 2), Block(64, 8, 4)], ids=str)
def test_every_block_size_writes_the_same(block):
    matrix = torch.randn(96, 160, device=DEVICE).to(torch.bfloat16)
    expect_both(pack(matrix, block=block), codes_of(matrix), masks.transposable(matrix))


@pytest.mark.parametrize(
    "layout",
    [
        LAYOUTS["other"],
        MetadataLayout((3, 34, 32, 33, 0, 1, 2, 4, 5)),  # that of 16-bit values
        MetadataLayout((0, 1, 2, 3, 4, 5, 32, 33, 34, 35), padding=0b0100),
        MetadataLayout((35, 34, 33, 32, 3, 2, 1, 0)),
    ],
    ids=lambda layout: f"{layout.block_rows} rows x {layout.block_groups} groups",
)
def test_any_bit_permutation_can_be_written(layout):
    matrix = torch.randn(96, 160, device=DEVICE).to(torch.bfloat16)
    expect_both(pack(matrix, layout=layout), codes_of(matrix), masks.transposable(matrix), layout)


@pytest.mark.parametrize("view", ["transposed", "sliced columns", "sliced rows", "shifted", "rows of 16 bytes more"])
def test_any_strides(view):
    base = torch.randn(96, 104, device=DEVICE).to(torch.bfloat16)
    matrix = {
        "transposed": base[:64, :96].mT,
        "sliced columns": base[:64, 16:80],
        "sliced rows": base[32:, :96],
        "shifted": base[:64, 1:97],
        "rows of 16 bytes more": base[:64, :96],
    }[view]
    expect_both(pack(matrix), codes_of(matrix), masks.transposable(matrix))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [*SHAPES, (1, 64)], ids=str)
def test_unpack_is_exact(shape, layout):
    quantised = torch.randint(0, 256, shape, dtype=torch.uint8, device=DEVICE)
    packed = packing.pack(quantised, masks.row(torch.randn(shape, device=DEVICE)))
    out = torch.full(shape, 7, dtype=torch.uint8, device=DEVICE).view(FP8)
    unpack.launch(LAYOUTS[layout].encode(packed), out, layout=LAYOUTS[layout])
    assert torch.equal(out.view(torch.uint8), packing.unpack(packed))


def test_bad_arguments_are_named():
    matrix = torch.zeros(64, 64, device=DEVICE)
    largest, out = torch.tensor(1.0, device=DEVICE), torch.zeros(64, 64, dtype=torch.uint8, device=DEVICE)
    with pytest.raises(ShapeError, match="multiples of 32"):
        pack(matrix[:, :48], largest)
    with pytest.raises(ShapeError, match="multiples of 32"):
        pack(matrix[:48], largest)
    with pytest.raises(TensorError, match=r"matrix is torch\.float64, .* packed as float8_e4m3fn"):
        pack(matrix.double(), largest)
    with pytest.raises(TensorError, match=r"largest is torch\.float32"):
        prune_pack8.launch(matrix, largest, buffer_for(64, 64), None, layout=SM90_8BIT)
    with pytest.raises(TensorError, match=r"largest is .* not empty"):
        pack(matrix, largest[None][:0])
    with pytest.raises(ConfigError, match="mask='soft' is not packed as e4m3"):
        pack(matrix, largest, "soft")
    with pytest.raises(ConfigError, match="mask='greedy'"):
        pack(matrix, largest, "greedy")
    with pytest.raises(ConfigError, match="mask='row' keeps 2:4 along the columns only"):
        buffers = buffer_for(64, 64), buffer_for(64, 64)
        prune_pack8.launch(matrix, largest.view(torch.int32), *buffers, layout=SM90_8BIT, mask="row")
    with pytest.raises(ConfigError, match="packed and packed_t are both None"):
        pack(matrix, largest, written=(False, False))
    with pytest.raises(TensorError, match="int16 tile codes"):
        pack(matrix, largest, codes=torch.zeros(16, 16, dtype=torch.int32, device=DEVICE))
    with pytest.raises(TensorError, match="scale is"):
        pack(matrix, largest, scale=largest.double())
    with pytest.raises(ConfigError, match="whole metadata blocks"):
        pack(matrix, largest, block=Block(tile_rows=8, pairs=8))
    with pytest.raises(ConfigError, match="16 rows of tiles x 8 pairs"):
        pack(matrix, largest, layout=MetadataLayout((0, 1, 32, 33)), block=Block(tile_rows=8, pairs=8))
    with pytest.raises(ShapeError, match="packed_t has 2559 bytes; a 64 x 64 matrix needs 2560"):
        wrong = buffer_for(64, 64)[:2559]
        prune_pack8.launch(matrix, largest.view(torch.int32), buffer_for(64, 64), wrong, layout=SM90_8BIT)
    with pytest.raises(ShapeError, match="its columns must be a multiple of 32"):
        unpack.launch(out.flatten(), out[:, :48].contiguous(), layout=SM90_8BIT)
    with pytest.raises(ShapeError, match="needs 2560"):
        unpack.launch(buffer_for(64, 64)[:2559], out, layout=SM90_8BIT)
