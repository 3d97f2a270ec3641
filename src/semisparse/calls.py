"""Which layers were called: evidence from the ops, also from inside compiled code.

The flag that a layer sets in eager forward is not set under torch.compile: a write there would cost host time at every
call and break strict export and checkpointed regions. The ops run in Python either way. Those that prune a weight see
it; those that prune tokens are counted and compared with eager calls, so that calls from compiled code show as more.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakSet

from torch import Tensor


class Watch:
    """What ops have read while this object lived."""

    __slots__ = ("__weakref__", "_eager_calls", "_seen", "_token_ops")

    def __init__(self) -> None:
        self._seen: set[int] = set()
        self._token_ops = self._eager_calls = 0
        _watches.add(self)

    def saw(self, matrix: Tensor) -> bool:
        """Whether an op has read the memory that matrix starts at. False for shards and fakes, which start nowhere."""
        try:
            return matrix.data_ptr() in self._seen
        except RuntimeError:  # no storage: a fake or a wrapper
            return False

    @property
    def tokens_unexplained(self) -> bool:
        """Whether tokens were pruned that no eager call of a layer explains: in compiled code, then."""
        return self._token_ops > self._eager_calls

    def _note(self, address: int) -> None:
        self._seen.add(address)

    def _note_tokens(self, ops: int, calls: int) -> None:
        self._token_ops += ops
        self._eager_calls += calls


# Empty but between the start of a schedule and its first sparse step: an address that is remembered for longer could be
# another tensor's by then.
_watches: WeakSet[Watch] = WeakSet()
_here = threading.local()  # a check in one thread must not hide the training of another


@contextmanager
def unnoticed() -> Iterator[None]:
    """Inside the block neither ops nor optimizer steps are noted: they are a check's, not the training's."""
    before, _here.paused = paused(), True
    try:
        yield
    finally:
        _here.paused = before


def paused() -> bool:
    """Whether a check is running in this thread."""
    return getattr(_here, "paused", False)


def note(matrix: Tensor) -> None:
    """Tell those who watch that an op pruned this weight."""
    if _watches and not paused():
        address = matrix.data_ptr()
        for watch in list(_watches):
            watch._note(address)


def note_tokens(*, op: bool) -> None:
    """Tell those who watch that tokens were pruned by an op, or that an eager call of a layer is about to."""
    if _watches and not paused():
        for watch in list(_watches):
            watch._note_tokens(op, not op)
