"""The pack kernel against the reference: on the CPU through Triton's interpreter, on a GPU as it is."""

import pytest
import torch

from semisparse.errors import ConfigError, ShapeError, TensorError
from semisparse.formats.layout import SM90_16BIT, MetadataLayout, packed_bytes
from semisparse.kernels import prune_pack
from semisparse.kernels.prune_pack import Block
from semisparse.masks import MASKS
from semisparse.reference import masks, packing

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
HALVES = [torch.float16, torch.bfloat16]
OTHER_LAYOUT = MetadataLayout((32, 1, 0, 33, 2, 34, 3, 4))
SHAPES = [(64, 64), (16, 16), (48, 80), (80, 16), (16, 208), (144, 96), (128, 192)]


def buffers(rows: int, columns: int, transposed: bool = True) -> tuple[torch.Tensor, torch.Tensor | None]:
    first = torch.full((packed_bytes(rows, columns),), 0xA5, dtype=torch.uint8, device=DEVICE)
    turned = torch.full((packed_bytes(columns, rows),), 0xA5, dtype=torch.uint8, device=DEVICE)
    return first, turned if transposed else None


def pack(matrix, dtype, mask="transposable", layout=SM90_16BIT, rows_padded=None, **kwargs):
    rows = rows_padded or matrix.shape[0]
    packed, packed_t = buffers(rows, matrix.shape[1], MASKS[mask].both_ways)
    prune_pack.launch(
        matrix,
        packed,
        packed_t,
        dtype=dtype,
        layout=layout,
        mask=mask,
        rows_padded=rows_padded,
        **kwargs,
    )
    return packed, packed_t


def expect(buffer, matrix, mask, dtype, layout=SM90_16BIT):
    """buffer holds matrix with mask, byte for byte, and what lies behind the last block is untouched."""
    written = layout.encode(packing.pack(matrix, mask, dtype))
    assert torch.equal(buffer[: written.numel()], written)
    assert bool((buffer[written.numel() :] == 0xA5).all())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("source", DTYPES, ids=str)
def test_transposable_is_the_reference_byte_for_byte(source, shape):
    matrix = torch.randn(shape, device=DEVICE).to(source)
    mask = masks.transposable(matrix)
    for dtype in HALVES if shape in SHAPES[:3] else HALVES[:1]:
        packed, packed_t = pack(matrix, dtype)
        expect(packed, matrix, mask, dtype)
        expect(packed_t, matrix.mT, mask.mT, dtype)


def pack_transpose(matrix, dtype, layout=SM90_16BIT, rows_padded=None, **kwargs):
    packed_t = buffers(rows_padded or matrix.shape[0], matrix.shape[1])[1]
    prune_pack.launch(matrix, None, packed_t, dtype=dtype, layout=layout, rows_padded=rows_padded, **kwargs)
    return packed_t


@pytest.mark.parametrize("shape", [(64, 64), (48, 80)], ids=str)
@pytest.mark.parametrize("source", DTYPES, ids=str)
def test_the_transpose_alone_has_the_bytes_of_packing_both(source, shape):
    matrix = torch.randn(shape, device=DEVICE).to(source)
    codes = masks.to_codes(masks.transposable(torch.randn(shape, device=DEVICE))).to(torch.int16)
    for dtype in HALVES:
        for given in ({}, {"codes": codes}):
            assert torch.equal(pack_transpose(matrix, dtype, **given), pack(matrix, dtype, **given)[1])


@pytest.mark.parametrize("block", [Block(32, 8, 4), Block(16, 16, 8)], ids=str)
def test_the_transpose_alone_of_padded_rows_and_with_any_block(block):
    x = torch.randn(33, 80, device=DEVICE).to(torch.bfloat16)
    padded = torch.nn.functional.pad(x, (0, 0, 0, 15))
    packed_t = pack_transpose(x, torch.bfloat16, rows_padded=48, block=block)
    expect(packed_t, padded.mT, masks.transposable(padded).mT, torch.bfloat16)


def test_the_transpose_alone_needs_whole_metadata_blocks_of_the_transpose_only():
    layout = MetadataLayout((0, 1, 32, 33, 34, 35, 36))  # blocks of 4 rows x 32 groups
    matrix = torch.randn(256, 64, device=DEVICE)
    block = Block(tile_rows=32, pairs=8)
    packed_t = pack_transpose(matrix, torch.float16, layout, block=block)
    expect(packed_t, matrix.mT, masks.transposable(matrix).mT, torch.float16, layout)
    with pytest.raises(ConfigError, match="whole metadata blocks"):
        pack(matrix, torch.float16, layout=layout, block=block)


@pytest.mark.parametrize("block", [Block(32, 8, 4), Block(16, 16, 8)], ids=str)
@pytest.mark.parametrize("source", DTYPES, ids=str)
def test_every_block_size_writes_the_same(source, block):
    matrix = torch.randn(144, 208, device=DEVICE).to(source)
    mask = masks.transposable(matrix)
    packed, packed_t = pack(matrix, torch.bfloat16, block=block)
    expect(packed, matrix, mask, torch.bfloat16)
    expect(packed_t, matrix.mT, mask.mT, torch.bfloat16)


@pytest.mark.parametrize("source", DTYPES, ids=str)
def test_ties_follow_the_reference(source):
    matrix = torch.randint(-2, 3, (64, 128), device=DEVICE).to(source)
    for name, chosen in (("transposable", masks.transposable(matrix)), ("row", masks.row(matrix))):
        expect(pack(matrix, torch.float16, name)[0], matrix, chosen, torch.float16)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_values_half_way_between_two_are_rounded_to_even(dtype):
    step = torch.finfo(dtype).eps / 2
    matrix = 1 + step * torch.arange(64 * 64, device=DEVICE).view(64, 64).remainder(97)
    matrix[::2] *= -1
    expect(pack(matrix, dtype, "row")[0], matrix, masks.row(matrix), dtype)


@pytest.mark.parametrize("source", DTYPES, ids=str)
def test_nan_infinity_and_negative_zero(source):
    matrix = torch.randn(64, 64, device=DEVICE).to(source)
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 0.0], device=DEVICE).to(source)
    at = torch.randint(0, 64 * 64, (900,), device=DEVICE)
    matrix.view(-1)[at] = special[torch.arange(900, device=DEVICE) % 5]
    for name, chosen in (("transposable", masks.transposable(matrix)), ("row", masks.row(matrix))):
        packed, packed_t = pack(matrix, torch.bfloat16, name)
        for buffer, values, mask in ((packed, matrix, chosen), (packed_t, matrix.mT, chosen.mT)):
            if buffer is None:
                continue
            rows, columns = values.shape
            ours = SM90_16BIT.decode(buffer, rows, columns, torch.bfloat16)
            reference = packing.pack(values, mask, torch.bfloat16)
            assert torch.equal(ours.nibbles, reference.nibbles)
            same = ours.values.view(torch.int16) == reference.values.view(torch.int16)
            assert bool((same | (ours.values.isnan() & reference.values.isnan())).all())


@pytest.mark.parametrize("tokens", [1, 7, 13, 33, 64])
def test_rows_are_padded_with_zeros(tokens):
    x = torch.randn(tokens, 80, device=DEVICE).to(torch.bfloat16)
    rows = -(-tokens // 16) * 16
    padded = torch.nn.functional.pad(x, (0, 0, 0, rows - tokens))
    mask = masks.transposable(padded)
    packed, packed_t = pack(x, torch.bfloat16, rows_padded=rows)
    expect(packed, padded, mask, torch.bfloat16)
    expect(packed_t, padded.mT, mask.mT, torch.bfloat16)


@pytest.mark.parametrize("source", DTYPES, ids=str)
def test_row_keeps_the_two_largest_of_a_row(source):
    matrix = torch.randn(48, 144, device=DEVICE).to(source)
    packed, _ = pack(matrix, torch.bfloat16, "row")
    expect(packed, matrix, masks.row(matrix), torch.bfloat16)


def test_codes_apply_a_given_mask():
    matrix, other = (torch.randn(48, 80, device=DEVICE).to(torch.bfloat16) for _ in range(2))
    mask = masks.transposable(other)
    packed, packed_t = pack(matrix, torch.bfloat16, codes=masks.to_codes(mask).to(torch.int16))
    expect(packed, matrix, mask, torch.bfloat16)
    expect(packed_t, matrix.mT, mask.mT, torch.bfloat16)


@pytest.mark.parametrize("source", DTYPES, ids=str)
def test_soft_shrinks_the_kept_two(source):
    matrix = torch.randn(48, 80, device=DEVICE).to(source)
    scale = torch.tensor([1.5], device=DEVICE)
    packed, _ = pack(matrix, torch.float16, "soft", scale=scale)
    groups = matrix.float().view(48, 20, 4)
    threshold = groups.abs().sort(-1).values[..., 1:2]
    shrunk = (groups.sign() * (groups.abs() - threshold).clamp(min=0) * scale).view(48, 80)
    ours = SM90_16BIT.decode(packed, 48, 80, torch.float16)
    reference = packing.pack(shrunk, masks.row(matrix), torch.float16)
    assert torch.equal(ours.nibbles, reference.nibbles)
    assert torch.equal(ours.values, reference.values)  # a kept value that ties with the threshold is a zero of any sign


@pytest.mark.parametrize("layout", [OTHER_LAYOUT], ids=["blocks of 32 rows x 32 columns"])
def test_any_bit_permutation_can_be_written(layout):
    matrix = torch.randn(80, 112, device=DEVICE).to(torch.bfloat16)
    mask = masks.transposable(matrix)
    packed, packed_t = pack(matrix, torch.bfloat16, layout=layout)
    for buffer, values, kept in ((packed, matrix, mask), (packed_t, matrix.mT, mask.mT)):
        written = layout.encode(packing.pack(values, kept, torch.bfloat16))
        assert torch.equal(buffer[: written.numel()], written)


@pytest.mark.parametrize("view", ["transposed", "sliced columns", "sliced rows", "shifted"])
def test_any_strides(view):
    base = torch.randn(160, 160, device=DEVICE).to(torch.bfloat16)
    matrix = {
        "transposed": base.mT,
        "sliced columns": base[:, 16:112],
        "sliced rows": base[16:80],
        "shifted": base[:, 1:97],
    }[view]
    expect(pack(matrix, torch.bfloat16)[0], matrix, masks.transposable(matrix), torch.bfloat16)


def test_bad_arguments_are_named():
    matrix = torch.zeros(32, 32, dtype=torch.bfloat16, device=DEVICE)
    with pytest.raises(ShapeError, match="multiples of 16"):
        pack(matrix[:, :24], torch.bfloat16)
    with pytest.raises(TensorError, match=r"torch\.float64"):
        pack(matrix.double(), torch.bfloat16)
    with pytest.raises(ConfigError, match="mask='greedy'"):
        pack(matrix, torch.bfloat16, "greedy")
    with pytest.raises(TensorError, match="int16 tile codes"):
        pack(matrix, torch.bfloat16, codes=torch.zeros(8, 8, dtype=torch.int32, device=DEVICE))
    with pytest.raises(ConfigError, match="needs a scale"):
        pack(matrix, torch.bfloat16, "soft")
    with pytest.raises(ShapeError, match="packed_t has 16 bytes"):
        prune_pack.launch(
            matrix,
            buffers(32, 32)[0],
            buffers(32, 32)[1][:16],
            dtype=torch.bfloat16,
            layout=SM90_16BIT._replace(padding=0),
        )
    with pytest.raises(ConfigError, match="whole metadata blocks"):
        pack(matrix, torch.bfloat16, layout=MetadataLayout((*range(8), 32, 33)))
    with pytest.raises(ConfigError, match="packed and packed_t are both None"):
        prune_pack.launch(matrix, None, None, dtype=torch.bfloat16, layout=SM90_16BIT)
    with pytest.raises(ShapeError, match="packed_t has 16 bytes"):
        prune_pack.launch(matrix, None, buffers(32, 32)[1][:16], dtype=torch.bfloat16, layout=SM90_16BIT)
