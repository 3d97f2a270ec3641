"""Questions that torch.compile answers while it traces, and takes the answers as constants."""

from collections.abc import Callable

import torch


def _constant(question: Callable[[], bool]) -> Callable[[], bool]:
    """What torch.compiler.assume_constant_result does, without importing the compiler."""
    question._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return question


@_constant
def exporting() -> bool:
    """Whether torch.export is at work. (torch.compile of torch 2.11 takes torch.compiler.is_exporting() for true.)"""
    return torch.compiler._is_exporting_flag


@_constant
def transforming() -> bool:
    """Whether a torch.func transform is at work. (torch.compile cannot trace the question itself.)"""
    return torch._C._functorch.maybe_current_level() is not None
