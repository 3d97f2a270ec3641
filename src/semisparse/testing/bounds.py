"""How exact a result must be: the same bits, or an error at most twice PyTorch's own. There are no free tolerances."""

from collections.abc import Iterable

import torch
from torch import Tensor

from semisparse.exactness import ERROR_RATIO, half_unit, largest, own_error

_BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


def assert_as_good_as_torch(
    ours: Tensor, same_dtype_result: Tensor, exact: Tensor, *, samples: Iterable[tuple[Tensor, Tensor]] = ()
) -> None:
    """Raise AssertionError unless the error of ours is at most twice that of plain PyTorch in the same dtype.

    The error of a result is its largest absolute difference from exact. PyTorch's error counts as at least half a unit
    in the last place of the largest exact value, which correct rounding may cost: a few values can be exact by chance.
    Where exact is not finite, or overflows in PyTorch's result, ours must have the same Inf or NaN as PyTorch's.

    Args:
        ours: The result under test.
        same_dtype_result: The same function by plain PyTorch operations; same shape and dtype.
        exact: The same function computed in fp64 from the same (already rounded) inputs.
        samples: For results of few values, whose largest error says little about PyTorch: further pairs of (PyTorch's
            result, exact) for other inputs of the same shapes, dtype and distribution. PyTorch's error is then the
            largest over all pairs. Read only as far as needed for ours to pass.

    Raises:
        AssertionError: The error is larger, or shapes or dtypes differ.
    """
    _assert_same_kind(ours, same_dtype_result)
    if exact.shape != ours.shape or exact.dtype != torch.float64:
        raise AssertionError(f"exact is {exact.dtype} {tuple(exact.shape)}; it must be float64 {tuple(ours.shape)}")
    ours64, torch64 = ours.detach().double(), same_dtype_result.detach().double()
    exact = exact.detach()
    finite = exact.isfinite() & torch64.isfinite()
    if not torch.equal(ours64[~finite].nan_to_num(nan=0.5), torch64[~finite].nan_to_num(nan=0.5)):
        raise AssertionError("Inf or NaN are in other places than in PyTorch's result")
    error = largest((ours64 - exact)[finite])
    allowed = own_error(same_dtype_result.detach()[finite], exact[finite])
    others = iter(samples)
    while not error <= ERROR_RATIO * allowed:
        sample = next(others, None)
        if sample is None:
            raise AssertionError(
                f"largest error {error:.3e} exceeds {ERROR_RATIO:g} x {allowed:.3e}, PyTorch's own in {ours.dtype}"
            )
        allowed = max(allowed, _sample_error(*sample))


def assert_same_up_to_rounding(ours: Tensor, expected: Tensor, *, operations: int) -> None:
    """Raise AssertionError unless two results of one formula in one dtype differ by its roundings at most.

    For results without a more exact reference, such as a formula in fp64. Each operation rounds by at most half a unit
    in the last place, in either result, so the two may differ by as many units of the largest value as there are
    operations. The sums of the formula must not cancel.

    Args:
        ours: The result under test.
        expected: The same formula, written in another way; same shape and dtype.
        operations: How many operations in a row round on the way from the inputs to one value of the result.

    Raises:
        AssertionError: The results differ by more, or in shape or dtype.
    """
    _assert_same_kind(ours, expected)
    error = largest(ours.detach().double() - expected.detach().double())
    allowed = operations * 2 * half_unit(largest(expected.detach().double()), ours.dtype)
    if not error <= allowed:
        raise AssertionError(
            f"largest difference {error:.3e} exceeds {allowed:.3e}, {operations} units in {ours.dtype}"
        )


def assert_bit_equal(ours: Tensor, expected: Tensor) -> None:
    """Raise AssertionError unless both tensors have the same shape, dtype and bits.

    Strides may differ. +0 and -0 are different; any NaN equals any other.

    Args:
        ours: The result under test.
        expected: What it must be.

    Raises:
        AssertionError: They differ; the message counts the differences and shows the first one.
    """
    _assert_same_kind(ours, expected)
    bits, expected_bits = (_as_bits(tensor) for tensor in (ours, expected))
    wrong = bits != expected_bits
    if bool(wrong.any()):
        first = tuple(int(i) for i in wrong.nonzero()[0])
        raise AssertionError(
            f"{int(wrong.sum())} of {wrong.numel()} values differ, first at {first}: {ours[first]} is not "
            f"{expected[first]}"
        )


def _assert_same_kind(ours: Tensor, expected: Tensor) -> None:
    kind, expected_kind = ((tensor.dtype, tuple(tensor.shape)) for tensor in (ours, expected))
    if kind != expected_kind:
        raise AssertionError(f"result is {kind}, expected {expected_kind}")


def _as_bits(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    if not tensor.is_floating_point():
        return tensor
    return torch.where(tensor.isnan(), torch.nan, tensor).contiguous().view(_BITS[tensor.element_size()])


def _sample_error(result: Tensor, exact: Tensor) -> float:
    difference = result.detach().double() - exact.detach()
    return largest(difference[difference.isfinite()])
