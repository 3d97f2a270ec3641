"""Questions and notes that torch.compile answers or takes once, while it traces."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

Question = TypeVar("Question", bound=Callable[..., object])


def constant(question: Question) -> Question:
    """The same as torch.compiler.assume_constant_result, without importing the compiler.

    Args:
        question: A function whose answer compiled code may take for constant, as long as its arguments are the same.
    """
    question._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return question


@constant
def recording() -> bool:
    """Whether torch.export or torch.jit.trace records a graph that may outlive this process.

    Such a graph can hold ops, and no Python functions. (In torch 2.11 torch.compile takes torch.compiler.is_exporting()
    for true.)
    """
    return torch.compiler._is_exporting_flag or torch._C._get_tracing_state() is not None


@constant
def exporting_to_onnx() -> bool:
    """Whether an ONNX export is running. (torch.compile itself takes torch.onnx.is_in_onnx_export() for false.)"""
    return torch.onnx.is_in_onnx_export()


@constant
def transforming() -> bool:
    """Whether a torch.func transform is active. (torch.compile cannot trace the query itself.)"""
    return torch._C._functorch.maybe_current_level() is not None


_noted: list[torch.dtype] = []


@constant
def note_compute_dtype(dtype: torch.dtype) -> bool:
    """Note that traced code computes in dtype, for weights that are packed for it later; returns True."""
    _noted.append(dtype)
    return True


def noted_compute_dtypes() -> Sequence[torch.dtype]:
    """All that were noted, the last one last."""
    return _noted
