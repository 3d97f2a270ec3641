"""Queries of PyTorch's state whose results torch.compile takes as constants while it traces."""

from collections.abc import Callable

import torch


def _constant(question: Callable[[], bool]) -> Callable[[], bool]:
    """The same as torch.compiler.assume_constant_result, without importing the compiler."""
    question._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return question


@_constant
def exporting() -> bool:
    """Whether torch.export is running. (In torch 2.11 torch.compile takes torch.compiler.is_exporting() for true.)"""
    return torch.compiler._is_exporting_flag


@_constant
def transforming() -> bool:
    """Whether a torch.func transform is active. (torch.compile cannot trace the query itself.)"""
    return torch._C._functorch.maybe_current_level() is not None
