"""The judges themselves: each must let a right result pass and stop a wrong one."""

import pytest
import torch

from semisparse import testing
from semisparse.testing import assert_as_good_as_torch, assert_bit_equal, assert_same_up_to_rounding, small_integers

NAN, INF = float("nan"), float("inf")


def triple(error: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A result with the given error, one with an error of 2^-10, and the truth."""
    exact = torch.ones(4, 4, dtype=torch.float64)
    ours, same = exact.float(), exact.float()
    ours[1, 2] += error
    same[3, 0] -= 2.0**-10
    return ours, same, exact


@pytest.mark.parametrize("error", [0.0, 2.0**-10, 2.0**-9, -(2.0**-9)])
def test_up_to_twice_the_error_of_torch_passes(error: float) -> None:
    assert_as_good_as_torch(*triple(error))


@pytest.mark.parametrize("error", [2.0**-9 + 2.0**-20, -(2.0**-8), 1.0, NAN, INF])
def test_more_than_twice_the_error_of_torch_fails(error: float) -> None:
    with pytest.raises(AssertionError):
        assert_as_good_as_torch(*triple(error))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1.5, 1.999, 96.0, 2.0**-10])
def test_where_torch_is_exact_ours_may_miss_by_one_unit_of_the_largest_value(scale: float, dtype: torch.dtype) -> None:
    same = torch.full((3,), scale).to(dtype)
    upwards = torch.nextafter(same, torch.tensor(INF, dtype=dtype))
    assert_as_good_as_torch(upwards, same, same.double())
    with pytest.raises(AssertionError, match="largest error"):
        assert_as_good_as_torch(torch.nextafter(upwards, torch.tensor(INF, dtype=dtype)), same, same.double())


def test_further_samples_raise_the_error_of_torch_and_are_read_only_as_far_as_needed() -> None:
    exact = torch.ones(2, dtype=torch.float64)
    read = []

    def samples(*errors: float):
        for error in errors:
            read.append(error)
            yield exact.float() + error, exact

    ours = exact.float() + 2.0**-9
    assert_as_good_as_torch(exact.float(), exact.float(), exact, samples=samples(1.0))
    assert read == []
    assert_as_good_as_torch(ours, exact.float(), exact, samples=samples(2.0**-12, -(2.0**-10), 1.0))
    assert read == [2.0**-12, -(2.0**-10)]
    for errors in ((), (2.0**-11, INF, NAN)):
        with pytest.raises(AssertionError, match="largest error"):
            assert_as_good_as_torch(ours, exact.float(), exact, samples=samples(*errors))


def test_where_everything_is_zero_ours_must_be() -> None:
    zeros = torch.zeros(3)
    assert_as_good_as_torch(-zeros, zeros, zeros.double())
    with pytest.raises(AssertionError):
        assert_as_good_as_torch(zeros + 2.0**-140, zeros, zeros.double())


@pytest.mark.parametrize("other", [torch.ones(4, 3), torch.ones(4, 4).half()])
def test_another_shape_or_dtype_fails(other: torch.Tensor) -> None:
    ours, same, exact = triple(0.0)
    for arguments in ((other, same, exact), (ours, same, exact[:3]), (ours, same, exact.float())):
        with pytest.raises(AssertionError):
            assert_as_good_as_torch(*arguments)


@pytest.mark.parametrize(("ours", "passes"), [(INF, True), (-INF, False), (NAN, False), (65504.0, False)])
def test_infinities_must_stand_where_torch_has_them(ours: float, passes: bool) -> None:
    exact = torch.tensor([1.0, 1e6], dtype=torch.float64)
    same = exact.half()  # overflows to +Inf
    result = torch.tensor([1.0, ours], dtype=torch.float16)
    if passes:
        assert_as_good_as_torch(result, same, exact)
    else:
        with pytest.raises(AssertionError, match="Inf or NaN"):
            assert_as_good_as_torch(result, same, exact)


def test_empty_results_are_compared_by_shape() -> None:
    empty = torch.empty(0, 4)
    assert_as_good_as_torch(empty, empty, empty.double())
    assert_bit_equal(empty, empty)
    with pytest.raises(AssertionError):
        assert_bit_equal(empty, torch.empty(4, 0))


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_bit_equality_sees_signed_zero_and_one_ulp_but_no_nan_payload(dtype: torch.dtype) -> None:
    values = torch.tensor([0.0, 1.0, NAN, INF], dtype=dtype)
    assert_bit_equal(values, values.clone())
    assert_bit_equal(values, torch.tensor([0.0, 1.0, -NAN, INF], dtype=dtype))
    for place, other in [(0, -0.0), (1, 1 + torch.finfo(dtype).eps), (2, 0.0), (3, -INF)]:
        changed = values.clone()
        changed[place] = other
        with pytest.raises(AssertionError, match=rf"1 of 4 values differ, first at \({place},\)"):
            assert_bit_equal(changed, values)


def test_bit_equality_ignores_strides_but_not_dtype() -> None:
    values = torch.arange(12).view(3, 4)
    assert_bit_equal(values.mT.contiguous().mT, values)
    with pytest.raises(AssertionError):
        assert_bit_equal(values, values.int())
    with pytest.raises(AssertionError):
        assert_bit_equal(values > 3, values > 4)


def test_small_integers_are_whole_reproducible_and_within_the_limit() -> None:
    for dtype in testing.DTYPES:
        numbers = small_integers((50, 40), seed=3, limit=2, dtype=dtype)
        assert numbers.dtype == dtype
        assert set(numbers.flatten().tolist()) == {-2.0, -1.0, 0.0, 1.0, 2.0}
        assert torch.equal(numbers.float(), small_integers((50, 40), seed=3, limit=2))
    assert not torch.equal(small_integers((50, 40), seed=3), small_integers((50, 40), seed=4))


def test_the_grids_hold_the_awkward_cases() -> None:
    tokens = [m for m, _, _ in testing.LINEAR_SHAPES]
    sizes = [size for _, k, n in testing.LINEAR_SHAPES for size in (k, n)]
    assert {0, 1} <= set(tokens)
    assert {0, 1} <= set(testing.TOKEN_COUNTS)
    assert any(m % 4 for m in tokens)
    assert all(size % 4 == 0 for size in sizes)
    assert any(size % 16 for size in sizes)
    assert set(testing.HALF_DTYPES) < set(testing.DTYPES)


def test_the_same_formula_may_differ_by_one_unit_per_operation() -> None:
    expected = torch.tensor([1.0, -3.0], dtype=torch.float64)
    unit = 2 * torch.finfo(torch.float64).eps  # at the largest value, 3
    assert_same_up_to_rounding(expected + torch.tensor([3 * unit, 0]), expected, operations=3)
    with pytest.raises(AssertionError, match=r"3 units in torch\.float64"):
        assert_same_up_to_rounding(expected + torch.tensor([0, 4 * unit]), expected, operations=3)
    with pytest.raises(AssertionError, match="expected"):
        assert_same_up_to_rounding(expected.float(), expected, operations=3)
    with pytest.raises(AssertionError, match="exceeds"):
        assert_same_up_to_rounding(expected * torch.nan, expected, operations=3)
