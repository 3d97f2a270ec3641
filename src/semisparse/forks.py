"""Locks that are free in a forked process: a thread that held one when it was forked is not there to release it.

What such a thread was about to change is left as it was, or is made anew by whoever misses it.
"""

import os
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

_LOCKS: WeakKeyDictionary[Any, dict[str, Callable[[], Any]]] = WeakKeyDictionary()


def renewed_in_children(owner: object, name: str, make: Callable[[], Any]) -> None:
    """Give a lock's owner another one in each process that is forked from now on, for as long as the owner lives.

    Args:
        owner: An object or a module, whose lock is looked up at each use.
        name: Of the attribute that is the lock.
        make: threading.Lock or threading.RLock.
    """
    _LOCKS.setdefault(owner, {})[name] = make


def _renew() -> None:
    for owner, locks in list(_LOCKS.items()):
        for name, make in locks.items():
            setattr(owner, name, make())


if hasattr(os, "register_at_fork"):  # Windows forks nothing
    os.register_at_fork(after_in_child=_renew)
