"""What one call of a linear layer is, for measuring; and what a model asks of each of its layers."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
"""Name of a dtype in files and keys -> the dtype."""


@dataclass(frozen=True, slots=True)
class LinearProblem:
    """One call of a linear layer, forward and backward. Equal problems take equal time.

    Attributes:
        tokens: M.
        in_features: K.
        out_features: N.
        dtype: That the products are computed in, a key of DTYPES.
        weight_dtype: Of the stored weight; another one than dtype under autocast.
        input_dtype: Of the input as the layer gets it.
        bias: Whether there is one.
        grad_input: Whether dx is computed.
        grad_weight: Whether dW is computed.
    """

    tokens: int
    in_features: int
    out_features: int
    dtype: str = "bfloat16"
    weight_dtype: str = "bfloat16"
    input_dtype: str = "bfloat16"
    bias: bool = True
    grad_input: bool = True
    grad_weight: bool = True

    @property
    def size(self) -> str:
        """M x K x N as text."""
        return f"{self.tokens} x {self.in_features} x {self.out_features}"

    @property
    def timed(self) -> bool:
        """Whether a layer of this kind can be built and timed: nothing is empty, and DTYPES has its dtypes."""
        dtypes = {self.dtype, self.weight_dtype, self.input_dtype}
        return min(self.tokens, self.in_features, self.out_features) > 0 and dtypes <= DTYPES.keys()

    def to_record(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def from_record(record: Mapping[str, Any]) -> LinearProblem:
    """A problem from JSON values.

    Args:
        record: As LinearProblem.to_record gives it.

    Raises:
        AttributeError, TypeError, ValueError: The record is damaged.
    """
    problem = LinearProblem(**record)
    sizes = (problem.tokens, problem.in_features, problem.out_features)
    flags = (problem.bias, problem.grad_input, problem.grad_weight)
    if not all(type(size) is int for size in sizes) or not all(type(flag) is bool for flag in flags):
        raise ValueError(f"{dict(record)} has a size or a flag that is none")
    if not problem.timed:
        raise ValueError(f"{dict(record)} has a size that is not positive, or a dtype that is none")
    return problem


@dataclass(frozen=True, slots=True)
class LayerUse:
    """A linear layer of a model and its calls in one step.

    Attributes:
        name: As named_modules() gives it, without what torch's wrappers insert; "" for the root.
        in_features: K.
        out_features: N.
        calls: Each distinct problem and how often it is called.
        reads: Numbers of the inputs that it reads, in the order of its calls; layers with equal ones share their
            inputs. Empty where that is not known.
        stays: Why the layer stays dense whatever is measured; "" if it may be swapped.
    """

    name: str
    in_features: int
    out_features: int
    calls: tuple[tuple[LinearProblem, float], ...]
    reads: tuple[int, ...] = ()
    stays: str = ""
