"""Row-wise masks, complete over all orderings, and the greedy masks that exist for comparison."""

from itertools import product

import numpy as np
import pytest
import torch

from semisparse.reference import masks
from tests.reference import brute

pytestmark = pytest.mark.usefixtures("poison")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]

# A weak ordering of four entries gives each a rank, and every rank up to the largest is taken.
WEAK_ORDERINGS = [ranks for ranks in product(range(4), repeat=4) if set(ranks) == set(range(max(ranks) + 1))]
SIGNS = list(product([1, -1], repeat=4))


def test_there_are_75_weak_orderings() -> None:
    assert len(WEAK_ORDERINGS) == 75


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("lowest", [0.0, 1.0])
def test_row_mask_follows_the_rule_on_all_orderings_and_signs(dtype: torch.dtype, lowest: float) -> None:
    groups = np.array(
        [
            [(rank + lowest) * sign for rank, sign in zip(ranks, signs, strict=True)]
            for ranks in WEAK_ORDERINGS
            for signs in SIGNS
        ]
    )
    kept = masks.row(torch.from_numpy(groups).to(dtype))
    np.testing.assert_array_equal(kept.numpy(), [brute.row(group) for group in groups])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_row_mask_of_special_values(dtype: torch.dtype) -> None:
    palette = [0.0, -0.0, 1.0, -1.0, float("inf"), -float("inf"), float("nan")]
    groups = torch.tensor(list(product(palette, repeat=4)), dtype=dtype)
    expected = [brute.row(group) for group in groups.float().numpy()]
    np.testing.assert_array_equal(masks.row(groups).numpy(), expected)


def test_row_mask_of_a_wide_matrix_treats_each_group_alone() -> None:
    matrix = torch.randn(7, 20)
    expected = np.stack([brute.row(group) for group in matrix.numpy().reshape(-1, 4)]).reshape(7, 20)
    np.testing.assert_array_equal(masks.row(matrix).numpy(), expected)


@pytest.mark.parametrize("signed", [False, True])
def test_greedy_equals_a_slow_greedy(signed: bool) -> None:
    ties = torch.randint(-3, 4, (1200, 4)).float()
    matrix = torch.cat([torch.randn(1200, 4), ties])
    kept = masks.greedy(matrix, signed=signed).numpy().reshape(-1, 4, 4)
    expected = [brute.greedy(tile, signed) for tile in matrix.numpy().reshape(-1, 4, 4)]
    np.testing.assert_array_equal(kept, expected)


@pytest.mark.parametrize("signed", [False, True])
def test_greedy_keeps_seven_or_eight_and_never_more_than_two_a_line(signed: bool) -> None:
    # At most one row and one column can end with room: where they cross, the entry must be kept already.
    kept = masks.greedy(torch.randn(40_000, 4), signed=signed).numpy().reshape(-1, 4, 4)
    assert kept.sum(1).max() == 2
    assert kept.sum(2).max() == 2
    assert set(np.unique(kept.sum((1, 2)))) == {7, 8}


def kept_by_tile(matrix: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Kept magnitude of each tile of a matrix that is 4 columns wide, in fp64."""
    return torch.where(mask, matrix.double().abs(), 0).view(-1, 16).sum(-1)


def test_exact_keeps_at_least_what_greedy_keeps_where_greedy_keeps_eight() -> None:
    matrix = torch.randn(40_000, 4)
    mask = masks.greedy(matrix)
    complete = mask.view(-1, 16).sum(-1) == 8
    exact, greedy = kept_by_tile(matrix, masks.transposable(matrix)), kept_by_tile(matrix, mask)
    unit = torch.finfo(torch.float32).eps / 2
    assert bool((greedy[complete] <= exact[complete] * ((1 + unit) / (1 - unit)) ** 3).all())
    assert bool((greedy[complete] < exact[complete]).any())


def test_seven_kept_entries_can_outweigh_the_best_complete_tile() -> None:
    # Greedy's incomplete tiles are none of the 90, so single tiles may favour it; the sum below does not.
    tile = torch.tensor([[1.0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 0, 1], [0, 0, 1, 1]])
    assert masks.greedy(tile).sum() == 7
    assert kept_by_tile(tile, masks.greedy(tile)) == 7
    assert kept_by_tile(tile, masks.transposable(tile)) == 6


def test_on_normal_weights_signed_greedy_keeps_least_then_greedy_exact_and_row() -> None:
    matrix = torch.randn(40_000, 4)
    chosen = [masks.greedy(matrix, signed=True), masks.greedy(matrix), masks.transposable(matrix), masks.row(matrix)]
    signed, greedy, exact, row = (float(kept_by_tile(matrix, mask).sum()) for mask in chosen)
    assert signed < greedy < exact < row


def test_signed_greedy_drops_a_large_negative_weight_and_the_others_keep_it() -> None:
    matrix = torch.ones(4, 4)
    matrix[0, 0] = -100.0
    assert not masks.greedy(matrix, signed=True)[0, 0]
    for choose in (masks.greedy, masks.transposable, masks.row):
        assert choose(matrix)[0, 0]
