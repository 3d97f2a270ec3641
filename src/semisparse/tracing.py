"""Queries of PyTorch's state whose results torch.compile takes as constants while it traces."""

from collections.abc import Callable

import torch


def _constant(question: Callable[[], bool]) -> Callable[[], bool]:
    """The same as torch.compiler.assume_constant_result, without importing the compiler."""
    question._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return question


@_constant
def recording() -> bool:
    """Whether torch.export or torch.jit.trace records a graph that may outlive this process.

    Such a graph can hold ops, and no Python functions. (In torch 2.11 torch.compile takes torch.compiler.is_exporting()
    for true.)
    """
    return torch.compiler._is_exporting_flag or torch._C._get_tracing_state() is not None


@_constant
def transforming() -> bool:
    """Whether a torch.func transform is active. (torch.compile cannot trace the query itself.)"""
    return torch._C._functorch.maybe_current_level() is not None
