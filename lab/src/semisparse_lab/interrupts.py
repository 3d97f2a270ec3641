"""Ctrl-C between writing a file and noting that it was written."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def interrupted_later() -> Iterator[None]:
    """Let ctrl-C wait until the block ends, so that a file that is written is also named as kept.

    In another thread than the main one, where Python raises no KeyboardInterrupt, nothing is done.

    Raises:
        KeyboardInterrupt: At the end, if ctrl-C was pressed in the block and would have raised it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pressed: list[Any] = []
    before = signal.signal(signal.SIGINT, lambda *given: pressed.append(given))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if pressed and callable(before):
            before(*pressed[0])
