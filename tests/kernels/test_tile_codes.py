"""The kernel that only chooses masks, against the reference: in Triton's interpreter, or on a GPU as it is."""

from functools import partial

import pytest
import torch

from semisparse.errors import ConfigError, ShapeError, TensorError
from semisparse.kernels import tile_codes as kernel
from semisparse.masks import MASKS
from semisparse.reference import masks
from semisparse.testing import assert_bit_equal

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REFERENCE = {
    "transposable": masks.transposable,
    "row": masks.row,
    "soft": masks.row,
    "greedy": masks.greedy,
    "signed_greedy": partial(masks.greedy, signed=True),
}
EVERY_MASK = pytest.mark.parametrize("mask", REFERENCE)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
SHAPES = [
    (4, 4),
    (4, 24),
    (24, 4),
    (16, 128),
    (20, 100),
    (64, 68),
    (0, 8),
    (8, 0),
]  # 1, 6, 6, 128, 125, 272, 0, 0 tiles
SPECIAL = [float("nan"), -float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1.0, -1.0]


def expect(matrix: torch.Tensor, mask: str) -> None:
    """The kernel's codes are the reference's, and it writes nothing behind them."""
    tiles = matrix.shape[0] // 4, matrix.shape[1] // 4
    memory = torch.full((tiles[0] * tiles[1] + 8,), 0x5A5A, dtype=torch.int16, device=DEVICE)
    codes = memory[: tiles[0] * tiles[1]].view(tiles)
    kernel.launch(matrix, codes, mask=mask)
    assert_bit_equal(codes, masks.to_codes(REFERENCE[mask](matrix)).to(torch.int16))
    assert bool((memory[codes.numel() :] == 0x5A5A).all())


def test_every_mask_has_a_reference():
    assert set(MASKS) == set(REFERENCE)


@EVERY_MASK
@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_random_matrices_are_the_reference_bit_for_bit(shape, dtype, mask):
    expect(torch.randn(shape, device=DEVICE).to(dtype), mask)


@EVERY_MASK
@DTYPES
@pytest.mark.parametrize("limit", [1, 3])
def test_ties_follow_the_reference(limit, dtype, mask):
    expect(torch.randint(-limit, limit + 1, (128, 64), device=DEVICE).to(dtype), mask)


@EVERY_MASK
@DTYPES
def test_nan_infinity_and_negative_zero(dtype, mask):
    special = torch.tensor(SPECIAL, device=DEVICE).to(dtype)
    expect(special[torch.randint(len(SPECIAL), (128, 64), device=DEVICE)], mask)


@EVERY_MASK
@DTYPES
def test_the_smallest_numbers_are_told_apart(dtype, mask):
    smallest = torch.finfo(dtype).smallest_normal
    if DEVICE != "cpu" or dtype != torch.bfloat16:  # the interpreter misreads subnormal bf16
        smallest *= torch.finfo(dtype).eps
    expect((torch.randint(-9, 10, (64, 64), device=DEVICE).double() * smallest).to(dtype), mask)


@EVERY_MASK
@pytest.mark.parametrize("view", ["transposed", "one row of tiles", "sliced", "every second", "shifted", "expanded"])
def test_any_strides(view, mask):
    base = torch.randn(96, 96, device=DEVICE).to(torch.bfloat16)
    views = {
        "transposed": base[:, :36].mT,
        "one row of tiles": base[:, :4].mT,
        "sliced": base[8:40, 12:76],
        "every second": base[::2, ::2],
        "shifted": base[:, 1:37],
        "expanded": base[:1, :32].expand(16, 32),
    }
    expect(views[view], mask)


@EVERY_MASK
def test_tiles_of_zeros_and_ones(mask):
    tiles = torch.arange(0, 1 << 16, 29, device=DEVICE)  # 2260 of the 65536 tiles of zeros and ones, in 18 programs
    bits = (tiles[:, None] >> torch.arange(16, device=DEVICE) & 1).view(-1, 4)
    expect(bits.to(torch.float16), mask)


def test_bad_arguments_are_named():
    matrix, codes = torch.zeros(8, 16, device=DEVICE), torch.zeros(2, 4, dtype=torch.int16, device=DEVICE)
    with pytest.raises(ConfigError, match=r"mask='codes' is not one of 'transposable', 'row', 'soft', 'greedy'"):
        kernel.launch(matrix, codes, mask="codes")
    with pytest.raises(TensorError, match=r"torch\.float64"):
        kernel.launch(matrix.double(), codes, mask="row")
    with pytest.raises(TensorError, match=r"codes torch\.int32"):
        kernel.launch(matrix, codes.int(), mask="row")
    with pytest.raises(TensorError, match="contiguous int16"):
        kernel.launch(matrix, codes.mT.contiguous().mT, mask="row")
    for wrong in (matrix[:6], matrix[:, :14], matrix[:4]):
        with pytest.raises(ShapeError, match=r"codes \(2, 4\); there must be one per tile"):
            kernel.launch(wrong, codes, mask="greedy")
