"""One process-wide hook on all torch optimizers, which passes their steps on to the living schedules.

There is one hook from the first schedule on: hooks must not come and go while torch runs them.
"""

from functools import cache
from typing import Any, Protocol
from weakref import WeakSet

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from semisparse import calls


class Listener(Protocol):
    """What wants to know of optimizer steps."""

    def hear(self, optimizer: torch.optim.Optimizer) -> None:
        """Called after each step of each optimizer."""

    def hear_compiled(self) -> None:
        """Called before the next question if an optimizer stepped in compiled code."""


class _CompiledSteps:
    """Whether a compiled optimizer step ran: a plain attribute, because torch.compile can trace a write to one."""

    fired = False


_listeners: WeakSet[Listener] = WeakSet()
_compiled = _CompiledSteps()


def listen(listener: Listener) -> None:
    """Pass steps on to listener from now on; only a weak reference is kept."""
    _listeners.add(listener)
    _hook_once()


def deliver_compiled() -> None:
    """Tell all listeners if an optimizer stepped in compiled code since the last call."""
    if _compiled.fired:
        _compiled.fired = False
        for listener in list(_listeners):
            listener.hear_compiled()


@cache
def _hook_once() -> None:
    register_optimizer_step_post_hook(_after_step)


def _after_step(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if torch.compiler.is_compiling():
        _compiled.fired = True
        return
    if not calls.paused():
        for listener in list(_listeners):
            listener.hear(optimizer)
