"""Transposable masks against brute force over all 90 tiles, and against the tie rule written down independently."""

import time
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from semisparse.errors import ShapeError, TensorError
from semisparse.reference import masks
from tests.reference import brute

pytestmark = pytest.mark.usefixtures("poison")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
RANDOM_TILES = 200_000
KINDS: dict[str, Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]] = {
    "normal": lambda rng, shape: rng.standard_normal(shape),
    "heavy_tail": lambda rng, shape: rng.standard_t(2, shape),
    "small_integers": lambda rng, shape: rng.integers(-8, 9, shape),
}


def as_matrix(tiles: np.ndarray, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.from_numpy(tiles.astype(np.float32).reshape(-1, 4)).to(dtype)


def as_tiles(mask: Tensor) -> np.ndarray:
    return mask.numpy().reshape(-1, 4, 4)


def test_there_are_90_transposable_tiles_among_65536() -> None:
    assert brute.BINARY_TILES.shape == (65_536, 4, 4)
    assert len(brute.TRANSPOSABLE) == 90


def test_every_binary_tile_gets_an_optimal_mask_and_the_only_one_where_it_is_unique() -> None:
    kept = as_tiles(masks.transposable(as_matrix(brute.BINARY_TILES)))
    scores = np.stack([(brute.BINARY_TILES & tile).sum((1, 2)) for tile in brute.TRANSPOSABLE], axis=1)
    best = scores.max(1)
    np.testing.assert_array_equal((brute.BINARY_TILES & kept).sum((1, 2)), best)
    unique = (scores == best[:, None]).sum(1) == 1
    assert unique.sum() == 13_986  # counted before, by a program that is not ours
    np.testing.assert_array_equal(kept[unique], brute.TRANSPOSABLE[scores.argmax(1)][unique])
    assert (kept.sum(1) == 2).all()
    assert (kept.sum(2) == 2).all()


def test_ties_of_every_binary_tile_follow_the_specification() -> None:
    kept = as_tiles(masks.transposable(as_matrix(brute.BINARY_TILES)))
    np.testing.assert_array_equal(kept, brute.transposable(brute.BINARY_TILES))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_random_tiles_are_optimal_and_follow_the_tie_rule_bit_for_bit(kind: str, dtype: torch.dtype) -> None:
    drawn = KINDS[kind](np.random.default_rng(7), (RANDOM_TILES, 4, 4))
    matrix = as_matrix(drawn, dtype)
    tiles = matrix.float().numpy().reshape(-1, 4, 4)
    kept = as_tiles(masks.transposable(matrix))
    assert (kept.sum(1) == 2).all()
    assert (kept.sum(2) == 2).all()
    np.testing.assert_array_equal(brute.total(tiles, kept), brute.best_total(tiles))
    np.testing.assert_array_equal(kept, brute.transposable(tiles))


def test_the_fp32_optimum_is_the_real_one_up_to_the_rounding_of_seven_sums() -> None:
    tiles = np.random.default_rng(8).standard_normal((20_000, 4, 4)).astype(np.float32)
    kept = as_tiles(masks.transposable(as_matrix(tiles)))
    exact = np.abs(tiles.astype(np.float64))
    optimum = np.max([(exact * tile).sum((1, 2)) for tile in brute.TRANSPOSABLE], axis=0)
    unit = np.finfo(np.float32).eps / 2
    worst = ((1 - unit) / (1 + unit)) ** 3  # three roundings lie between an entry and the total
    assert ((exact * kept).sum((1, 2)) >= worst * optimum).all()


def test_near_ties_are_summed_in_the_specified_order() -> None:
    # Pairs below half a unit of the big entries: which sums lose them depends on the order of summation alone.
    rng = np.random.default_rng(9)
    tiles = np.where(rng.random((50_000, 4, 4)) < 0.5, 2.0**24, rng.integers(1, 4, (50_000, 4, 4))).astype(np.float32)
    kept = as_tiles(masks.transposable(as_matrix(tiles)))
    np.testing.assert_array_equal(kept, brute.transposable(tiles))


@pytest.mark.parametrize("value", [1.0, -1.0, 2.0**-149, 2.0**125])
def test_each_of_the_90_patterns_is_returned_as_itself(value: float) -> None:
    tiles = np.where(brute.TRANSPOSABLE, np.float32(value), np.float32(0))
    np.testing.assert_array_equal(as_tiles(masks.transposable(as_matrix(tiles))), brute.TRANSPOSABLE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values_follow_the_rule(dtype: torch.dtype) -> None:
    smallest = torch.finfo(dtype).smallest_normal / 4
    palette = [0.0, -0.0, 1.0, -1.0, float("inf"), -float("inf"), float("nan"), smallest, -smallest]
    drawn = torch.tensor(palette, dtype=dtype)[torch.randint(len(palette), (40_000, 4))]
    kept = as_tiles(masks.transposable(drawn))
    np.testing.assert_array_equal(kept, brute.transposable(drawn.float().numpy().reshape(-1, 4, 4)))


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
def test_one_broken_weight_is_kept_wherever_it_stands(broken: float) -> None:
    tiles = np.broadcast_to(np.float32(1), (16, 4, 4)).copy()
    tiles.reshape(16, 16)[np.arange(16), np.arange(16)] = broken
    kept = as_tiles(masks.transposable(as_matrix(tiles))).reshape(16, 16)
    assert kept[np.arange(16), np.arange(16)].all()


def test_signed_zero_and_sign_do_not_matter() -> None:
    matrix = torch.randn(64, 64) * (torch.rand(64, 64) < 0.6)
    flipped = torch.where(torch.rand(64, 64) < 0.5, -matrix, matrix)
    assert flipped[matrix == 0].signbit().any()
    assert torch.equal(masks.transposable(matrix), masks.transposable(flipped))


def test_overflowing_sums_still_give_a_valid_mask() -> None:
    matrix = torch.full((64, 64), torch.finfo(torch.float32).max) * (torch.rand(64, 64) + 0.5).clamp(max=1)
    kept = as_tiles(masks.transposable(matrix.reshape(-1, 4)))
    np.testing.assert_array_equal(kept, brute.transposable(matrix.numpy().reshape(-1, 4, 4)))


def test_fp64_is_compared_after_rounding_to_fp32() -> None:
    matrix = 1 + torch.rand(64, 64, dtype=torch.float64) * 2.0**-22  # a few fp32 values only: most comparisons tie
    assert torch.equal(masks.transposable(matrix), masks.transposable(matrix.float()))
    assert torch.equal(masks.row(matrix), masks.row(matrix.float()))


def views(rows: int, columns: int) -> dict[str, Tensor]:
    return {
        "transposed": torch.randn(columns, rows).mT,
        "every_second": torch.randn(2 * rows, 2 * columns)[::2, ::2],
        "offset": torch.randn(rows + 1, columns + 3)[1:, 3:],
        "expanded": torch.randn(1, columns).expand(rows, columns),
        "column": torch.randn(rows, 1).expand(rows, columns),
        "empty_rows": torch.randn(0, columns),
        "empty_columns": torch.randn(rows, 0),
    }


@pytest.mark.parametrize("choose", [masks.transposable, masks.row, masks.greedy])
@pytest.mark.parametrize("view", views(4, 4))
def test_strides_do_not_matter(view: str, choose: Callable[[Tensor], Tensor]) -> None:
    matrix = views(16, 24)[view]
    mask = choose(matrix)
    assert mask.dtype == torch.bool
    assert torch.equal(mask, choose(matrix.contiguous()))


def test_tiles_are_independent_of_each_other() -> None:
    matrix = torch.randn(32, 48)
    expected = brute.transposable_matrix(matrix.numpy())
    np.testing.assert_array_equal(masks.transposable(matrix).numpy(), expected)
    np.testing.assert_array_equal(masks.transposable(matrix[8:12, 16:20]).numpy(), expected[8:12, 16:20])


def test_choosing_a_mask_needs_no_gradient_and_changes_nothing() -> None:
    matrix = torch.randn(8, 8, requires_grad=True)
    before = matrix.detach().clone()
    assert not masks.transposable(matrix).requires_grad
    assert torch.equal(matrix, before)


def test_codes_and_masks_are_inverse_and_name_bits_as_documented() -> None:
    kept = as_matrix(brute.TRANSPOSABLE).bool()
    codes = masks.to_codes(kept)
    expected = [int((tile.reshape(-1) * (1 << np.arange(16))).sum()) for tile in brute.TRANSPOSABLE]
    assert codes.flatten().tolist() == expected
    assert torch.equal(masks.from_codes(codes), kept)
    assert torch.equal(masks.from_codes(codes.to(torch.int64)), kept)
    wide = masks.transposable(torch.randn(16, 24))
    assert torch.equal(masks.from_codes(masks.to_codes(wide)), wide)
    matrix = torch.randn(16, 24)
    assert torch.equal(masks.transposable_codes(matrix), masks.to_codes(masks.transposable(matrix)))


def test_a_mask_of_4096_x_1024_takes_under_a_second_on_one_core() -> None:
    assert torch.get_num_threads() == 1
    matrix = torch.randn(4096, 1024)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        masks.transposable(matrix)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1


@pytest.mark.parametrize("choose", [masks.transposable, masks.row, masks.greedy])
@pytest.mark.parametrize("shape", [(4,), (4, 4, 4), (4, 6), (8, 1)])
def test_shapes_without_groups_of_four_are_refused(shape: tuple[int, ...], choose: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(ShapeError, match=str(shape[-1])):
        choose(torch.zeros(shape))


@pytest.mark.parametrize("choose", [masks.transposable, masks.greedy])
def test_tiles_need_rows_in_fours(choose: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(ShapeError, match="both sizes must be a multiple of 4"):
        choose(torch.zeros(6, 8))
    assert masks.row(torch.zeros(6, 8)).shape == (6, 8)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64])
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    for choose in (masks.transposable, masks.row, masks.greedy):
        with pytest.raises(TensorError, match=str(dtype)):
            choose(torch.zeros(4, 4, dtype=dtype))
