"""Comparisons of results: a number, what is allowed, and in which result; all by rules without free tolerances."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from semisparse.exactness import ERROR_RATIO, largest, own_error

BITS = "none of the values may differ from the specification's: whole numbers, whose sums are exact"
TORCH = f"{ERROR_RATIO:g} times the error of PyTorch's own product of the same operands in the same dtype, against fp64"


@dataclass(frozen=True, slots=True)
class Found:
    """The outcome of one comparison.

    Attributes:
        error: As contents.Check has it.
        allowed: The same.
        where: The same.
        rule: The same.
    """

    error: float
    allowed: float
    where: str
    rule: str

    @property
    def ok(self) -> bool:
        """Whether the error is allowed; NaN never is."""
        return self.error <= self.allowed


def same_bits(ours: Mapping[str, Tensor], expected: Mapping[str, Tensor], rule: str = BITS) -> Found:
    """How many values differ, zeros of both signs being equal.

    Args:
        ours: Results by name.
        expected: The same names; shapes and dtypes that differ count as all values.
        rule: Why they must be equal.
    """
    wrong = {name: _differing(ours[name], value) for name, value in expected.items()}
    worst = max(wrong, key=lambda name: wrong[name])
    return Found(wrong[worst], 0, worst, rule)


def as_good_as_torch(ours: Mapping[str, Tensor], torchs: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> Found:
    """The error of the worst result, and twice that of PyTorch's there.

    Args:
        ours: Results by name.
        torchs: The same by plain PyTorch in the same dtype.
        exact: The same in fp64 of the same rounded operands.
    """
    found = {
        name: (largest(ours[name].double() - value), ERROR_RATIO * own_error(torchs[name], value))
        for name, value in exact.items()
    }
    worst = max(found, key=lambda name: _share(*found[name]))
    return Found(*found[worst], worst, TORCH)


def _differing(ours: Tensor, expected: Tensor) -> int:
    if ours.shape != expected.shape or ours.dtype != expected.dtype:
        return max(expected.numel(), 1)
    one, other = ours.detach().cpu(), expected.detach().cpu()
    return int(((one != other) & ~(one.isnan() & other.isnan())).sum())


def _share(error: float, allowed: float) -> float:
    """Error in units of what is allowed; NaN above all."""
    if error != error:
        return torch.inf
    return error / allowed if allowed else error
