"""Many matrices in one launch, against one launch for each: on the CPU in Triton's interpreter, on a GPU as it is."""

import pytest
import torch

from semisparse.errors import ConfigError, ShapeError
from semisparse.formats.layout import SM90_16BIT
from semisparse.kernels import prune_pack
from semisparse.kernels.pack_table import Matrix
from semisparse.kernels.prune_pack_many import Batch
from semisparse.masks import MASKS
from semisparse.testing import assert_bit_equal
from tests.kernels.test_prune_pack import DEVICE, HALVES, buffers

WHOLE = [(64, 128), (128, 128), (64, 256)]  # every program lies inside, for both blocks
PARTIAL = [(16, 16), (48, 80), (64, 128), (80, 16), (144, 96)]


def members(matrices, both=True, **held):
    made = []
    for at, matrix in enumerate(matrices):
        packed, packed_t = buffers(*matrix.shape, both)
        made.append(Matrix(matrix, packed, packed_t, **{name: values[at] for name, values in held.items()}))
    return made


def assert_as_alone(made, dtype, mask="transposable"):
    for member in made:
        packed, packed_t = buffers(*member.matrix.shape, member.packed_t is not None)
        prune_pack.launch(
            member.matrix, packed, packed_t, dtype=dtype, layout=SM90_16BIT, mask=mask, codes=member.codes,
            scale=member.scale,
        )  # fmt: skip
        assert_bit_equal(member.packed, packed)
        assert (member.packed_t is None) == (packed_t is None)
        if packed_t is not None:
            assert_bit_equal(member.packed_t, packed_t)


@pytest.mark.parametrize(
    ("source", "shapes"),
    [
        (torch.float32, WHOLE),
        *((source, shapes) for source in (torch.float32, *HALVES) for shapes in (PARTIAL[:2], PARTIAL[:1])),
    ],
    ids=str,
)
def test_the_bytes_are_those_of_single_launches(source, shapes):
    matrices = [torch.randn(shape, device=DEVICE).to(source) for shape in shapes]
    for dtype in HALVES if len(shapes) == 1 else HALVES[:1]:
        made = members(matrices)
        Batch(made, dtype, SM90_16BIT, "transposable").launch()
        assert_as_alone(made, dtype)


@pytest.mark.parametrize("mask", [name for name, mask in MASKS.items() if mask.chosen_while_packing])
def test_every_mask_and_what_is_held(mask):
    matrices = [torch.randn(shape, device=DEVICE) for shape in PARTIAL]
    held = {}
    if MASKS[mask].needs_scale:
        held["scale"] = [torch.tensor(1.25 + at, device=DEVICE) for at in range(len(matrices))]
    made = members(matrices, MASKS[mask].both_ways, **held)
    Batch(made, torch.bfloat16, SM90_16BIT, mask).launch()
    assert_as_alone(made, torch.bfloat16, mask)


@pytest.mark.parametrize("both", [True, False])
def test_given_codes_and_the_transpose_left_out(both):
    from semisparse import ops

    matrices = [torch.randn(shape, device=DEVICE).bfloat16() for shape in PARTIAL[:3]]
    codes = [ops.tile_codes(torch.randn(shape), "transposable").to(DEVICE) for shape in PARTIAL[:3]]
    made = members(matrices, both, codes=codes)
    Batch(made, torch.bfloat16, SM90_16BIT, "transposable").launch()
    assert_as_alone(made, torch.bfloat16)


def test_a_batch_packs_what_its_matrices_hold_at_each_launch():
    matrices = [torch.randn(shape, device=DEVICE).bfloat16() for shape in PARTIAL[:2]]
    made = members(matrices)
    batch = Batch(made, torch.bfloat16, SM90_16BIT, "transposable")
    for _ in range(2):
        batch.launch()
        assert_as_alone(made, torch.bfloat16)
        for matrix in matrices:
            matrix.neg_().add_(1)


def test_rows_apart_are_read_where_they_lie():
    wide = torch.randn(48, 256, device=DEVICE).bfloat16()
    made = members([wide[:, 32:112], wide[16:, :64]])
    Batch(made, torch.bfloat16, SM90_16BIT, "transposable").launch()
    assert_as_alone(made, torch.bfloat16)


def test_what_does_not_fit_is_refused_before_anything_is_written():
    matrix = torch.randn(48, 64, device=DEVICE).bfloat16()
    packed, packed_t = buffers(48, 64)
    short = packed[: SM90_16BIT.buffer_bytes(48, 64) - 16]
    with pytest.raises(ShapeError, match="packed has"):
        Batch([Matrix(matrix, short, packed_t)], torch.bfloat16, SM90_16BIT, "transposable")
    with pytest.raises(ConfigError, match="needs a scale"):
        Batch([Matrix(matrix, packed, None)], torch.bfloat16, SM90_16BIT, "soft")
    assert bool((packed == 0xA5).all())


def test_a_default_device_does_not_matter():
    matrix = torch.randn(48, 64, device=DEVICE).bfloat16()
    made = members([matrix])
    with torch.device("meta"):
        Batch(made, torch.bfloat16, SM90_16BIT, "transposable").launch()
    assert_as_alone(made, torch.bfloat16)


@pytest.mark.gpu
def test_a_launch_follows_its_stream_and_a_dropped_table_stays_until_it_is_read():
    matrices = [torch.randn(512, 512, device="cuda").bfloat16() for _ in range(8)]
    made, busy = members(matrices), torch.randn(4096, 4096, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(20):
            busy = busy @ busy * 1e-3  # the launch waits behind these
        Batch(made, torch.bfloat16, SM90_16BIT, "transposable").launch()
    other = members([torch.zeros_like(matrix) for matrix in matrices])
    Batch(other, torch.bfloat16, SM90_16BIT, "transposable").launch()  # would take the same memory for its table
    torch.cuda.synchronize()
    assert_as_alone(made, torch.bfloat16)
    assert_as_alone(other, torch.bfloat16)
