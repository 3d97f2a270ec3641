"""Packing against an independent slow packer, over every pattern that fits."""

from itertools import product

import numpy as np
import pytest
import torch

from semisparse.errors import ShapeError, TensorError
from semisparse.reference import masks, packing
from semisparse.testing import assert_bit_equal
from tests.reference import brute

pytestmark = pytest.mark.usefixtures("poison")

PATTERNS = [bits for bits in product([False, True], repeat=4) if sum(bits) <= 2]
WORDS = np.array(list(product(PATTERNS, repeat=4))).reshape(-1, 16)
"""Every mask of four groups that can be packed: 11^4 rows."""


def slow_pack(matrix: np.ndarray, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    packed = [brute.pack(group, bits) for group, bits in zip(matrix.reshape(-1, 4), kept.reshape(-1, 4), strict=True)]
    values = np.array([values for values, _ in packed]).reshape(len(matrix), -1)
    return values, np.array([nibble for _, nibble in packed], np.uint8).reshape(len(matrix), -1)


@pytest.mark.parametrize("fill", [0.0, -0.0, 5.0, float("inf"), float("nan")])
def test_all_14641_words_pack_as_the_slow_packer_says(fill: float) -> None:
    assert len(WORDS) == 11**4
    values = torch.randn(len(WORDS), 16)
    mask = torch.from_numpy(WORDS)
    matrix = torch.where(mask, values, fill)
    packed = packing.pack(matrix, mask)
    expected_values, expected_nibbles = slow_pack(matrix.numpy(), WORDS)
    assert_bit_equal(packed.values, torch.from_numpy(expected_values).float())
    assert_bit_equal(packed.nibbles, torch.from_numpy(expected_nibbles))
    assert_bit_equal(packing.unpack(packed), torch.where(mask, values, 0.0))


def test_packing_what_was_unpacked_changes_nothing() -> None:
    mask = torch.from_numpy(WORDS)
    packed = packing.pack(torch.randn(len(WORDS), 16), mask)
    again = packing.pack(packing.unpack(packed), mask)
    assert_bit_equal(again.values, packed.values)
    assert_bit_equal(again.nibbles, packed.nibbles)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_both_directions_of_a_transposable_mask(dtype: torch.dtype) -> None:
    matrix = torch.randn(36, 20).to(dtype)
    mask = masks.transposable(matrix)
    along_k, along_n = packing.pack(matrix, mask), packing.pack(matrix.mT, mask.mT)
    pruned = torch.where(mask, matrix, 0)
    assert_bit_equal(packing.unpack(along_k), pruned)
    assert_bit_equal(packing.unpack(along_n), pruned.mT)
    assert along_k.values.shape == (36, 10)
    assert along_k.nibbles.shape == (36, 5)
    assert along_n.values.shape == (20, 18)
    assert along_n.nibbles.shape == (20, 9)
    for packed in (along_k, along_n):
        assert packed.values.dtype == dtype
        assert packed.nibbles.dtype == torch.uint8
        assert packed.values.is_contiguous()
        assert packed.nibbles.is_contiguous()


def test_values_are_rounded_once_to_the_packed_dtype() -> None:
    matrix = torch.randn(16, 32, dtype=torch.float64)
    mask = masks.transposable(matrix)
    packed = packing.pack(matrix, mask, torch.bfloat16)
    assert packed.values.dtype == torch.bfloat16
    assert_bit_equal(packing.unpack(packed), torch.where(mask, matrix.to(torch.bfloat16), 0))


def test_kept_negative_zeros_stay_negative() -> None:
    matrix = torch.full((1, 4), -0.0)
    packed = packing.pack(matrix, torch.tensor([[True, False, False, True]]))
    assert packed.values.signbit().tolist() == [[True, True]]
    assert packing.unpack(packed).signbit().tolist() == [[True, False, False, True]]


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_row_masks_pack_any_number_of_rows(rows: int) -> None:
    matrix = torch.randn(rows, 8)
    mask = masks.row(matrix)
    assert_bit_equal(packing.unpack(packing.pack(matrix, mask)), torch.where(mask, matrix, 0))


def test_more_than_two_in_a_group_is_refused() -> None:
    for kept in ([True, True, True, False], [True, True, True, True]):
        with pytest.raises(ShapeError, match="more than 2 of 4"):
            packing.pack(torch.ones(1, 4), torch.tensor([kept]))


def test_a_row_mask_does_not_pack_along_the_rows() -> None:
    matrix = torch.zeros(4, 4)
    with pytest.raises(ShapeError, match="more than 2 of 4"):
        packing.pack(matrix.mT, masks.row(matrix).mT)


def test_masks_of_another_shape_or_dtype_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"mask has shape \(4, 4\), matrix \(4, 8\)"):
        packing.pack(torch.ones(4, 8), torch.zeros(4, 4, dtype=torch.bool))
    with pytest.raises(TensorError, match=r"torch\.float32"):
        packing.pack(torch.ones(4, 8), torch.zeros(4, 8))
    with pytest.raises(ShapeError, match="multiple of 4"):
        packing.pack(torch.ones(4, 6), torch.zeros(4, 6, dtype=torch.bool))
