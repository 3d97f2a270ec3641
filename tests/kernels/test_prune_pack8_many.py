"""Many matrices packed in e4m3 in one launch: on the CPU in Triton's interpreter, on a GPU as it is."""

import pytest
import torch

from semisparse.errors import ConfigError, ShapeError, TensorError
from semisparse.formats.layout import SM90_8BIT
from semisparse.kernels.pack_table import Matrix
from semisparse.kernels.prune_pack8_many import Batch
from semisparse.reference import fp8, masks
from semisparse.testing import assert_bit_equal
from tests.kernels.test_prune_pack8 import (
    DEVICE,
    LAYOUTS,
    SMALLEST,
    UNTOUCHED,
    buffer_for,
    codes_of,
    expect,
    expect_both,
)

WHOLE = [(64, 64), (64, 128)]  # every program lies inside
PARTIAL = [(32, 32), (32, 64)]


def members(matrices, both=True, codes=None):
    return [
        Matrix(
            matrix,
            buffer_for(*matrix.shape),
            buffer_for(*matrix.shape[::-1]) if both else None,
            None if codes is None else codes[at],
            torch.full((), -1.0, device=DEVICE),
        )
        for at, matrix in enumerate(matrices)
    ]


def expect_members(made, chosen):
    """All buffers hold the reference, byte for byte, with the mask that `chosen` gives of a matrix."""
    for member in made:
        mask, quantised = chosen(member.matrix), codes_of(member.matrix)
        if member.packed_t is None:
            expect(member.packed, quantised, mask)
        else:
            expect_both((member.packed, member.packed_t), quantised, mask)
        assert_bit_equal(member.scale, 1 / fp8.multiplier_for(fp8.largest_magnitude(member.matrix)))


@pytest.mark.parametrize(("dtype", "shapes"), [(torch.float32, PARTIAL), (torch.bfloat16, WHOLE)], ids=str)
def test_each_matrix_has_the_bytes_and_the_scale_that_it_has_alone(dtype, shapes):
    matrices = [(torch.randn(shape, device=DEVICE) * 30**at).to(dtype) for at, shape in enumerate(shapes)]
    made = members(matrices)
    Batch(made, SM90_8BIT, "transposable", SMALLEST).launch()
    expect_members(made, masks.transposable)


def test_row_keeps_the_two_largest_of_a_row():
    made = members([torch.randn(shape, device=DEVICE) for shape in PARTIAL], both=False)
    Batch(made, SM90_8BIT, "row", SMALLEST).launch()
    expect_members(made, masks.row)


def test_codes_apply_a_given_mask():
    matrices = [torch.randn(shape, device=DEVICE).bfloat16() for shape in PARTIAL]
    given = {shape: masks.transposable(torch.randn(shape, device=DEVICE)) for shape in PARTIAL}
    made = members(matrices, codes=[masks.to_codes(given[shape]).to(torch.int16) for shape in PARTIAL])
    Batch(made, SM90_8BIT, "transposable", SMALLEST).launch()
    expect_members(made, lambda matrix: given[tuple(matrix.shape)])


def test_a_batch_packs_what_its_matrices_hold_at_each_launch_where_they_lie():
    wide = torch.randn(32, 160, device=DEVICE).bfloat16()
    (member,) = made = members([wide[:, 96:128]])
    batch = Batch(made, SM90_8BIT, "transposable", SMALLEST)
    for changed in (0.5, torch.inf):
        member.matrix[3, 5] = changed
        batch.launch()
        expect_members(made, masks.transposable)
    assert member.scale.isnan()


def test_what_does_not_fit_is_refused_before_anything_is_written():
    (member,) = made = members([torch.randn(32, 64, device=DEVICE)])
    for error, message, wrong in (
        (TensorError, "scale is None", member._replace(scale=None)),
        (TensorError, "scale is torch.float64", member._replace(scale=member.scale.double())),
        (ShapeError, "packed has", member._replace(packed=member.packed[:-48])),
        (ShapeError, "multiples of 32", members([torch.randn(48, 64, device=DEVICE)])[0]),
    ):
        with pytest.raises(error, match=message):
            Batch([wrong], SM90_8BIT, "transposable")
    with pytest.raises(ConfigError, match="needs a scale"):
        Batch([member._replace(packed_t=None)], SM90_8BIT, "soft")
    with pytest.raises(ConfigError, match="whole stacks"):
        Batch(made, LAYOUTS["other"], "transposable", SMALLEST._replace(tile_rows=8))
    assert bool((member.packed == UNTOUCHED).all()) and member.scale == -1
