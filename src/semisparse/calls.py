"""Evidence of which layers were called, from the ops, so that it includes compiled code.

A layer sets a flag in eager forward, but not under torch.compile: a write there would cost host time per call and break
strict export and checkpointed regions. While anything watches, the ops run in Python, compiled or not. Ops that prune a
weight record it. Ops that prune tokens are counted and compared with eager calls of layers; a surplus comes from
compiled code.
"""

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from weakref import WeakSet, finalize

from torch import Tensor

from semisparse import native

_NOWHERE = -1


class Watch:
    """Records what ops read, from its construction on."""

    __slots__ = ("__weakref__", "_eager_calls", "_places", "_seen", "_token_ops")

    def __init__(self) -> None:
        self._seen: set[int] = set()
        self._places: dict[int, int] = {}
        self._token_ops = self._eager_calls = 0
        _watches.add(self)
        native.watch(1)  # ops that C++ runs do not come by here
        finalize(self, native.watch, -1)

    def place(self, matrices: Iterable[Tensor]) -> None:
        """Note where matrices are before a step, which may give them other memory by .data after its forward (SAM)."""
        self._places = {id(matrix): _address(matrix) for matrix in matrices}

    def saw(self, matrix: Tensor) -> bool:
        """Whether an op has read matrix, where it is or where place() found it; False without storage, as shards."""
        return not self._seen.isdisjoint((_address(matrix), self._places.get(id(matrix), _NOWHERE)))

    @property
    def tokens_unexplained(self) -> bool:
        """Whether more ops pruned tokens than eager calls of layers account for; the others ran in compiled code."""
        return self._token_ops > self._eager_calls

    def _note(self, address: int) -> None:
        self._seen.add(address)

    def _note_tokens(self, ops: int, calls: int) -> None:
        self._token_ops += ops
        self._eager_calls += calls


def _address(matrix: Tensor) -> int:
    """Where matrix starts."""
    try:
        return matrix.data_ptr()
    except RuntimeError:  # no storage: a fake tensor or a wrapper subclass
        return _NOWHERE


# Empty except between the start of a schedule and its first sparse step: memory at an address that is kept for longer
# could belong to another tensor by then.
_watches: WeakSet[Watch] = WeakSet()
_here = threading.local()  # a check in one thread must not hide training in another


@contextmanager
def unnoticed() -> Iterator[None]:
    """Record neither ops nor optimizer steps inside the block, which belong to a check and not to training."""
    before, _here.paused = paused(), True
    try:
        yield
    finally:
        _here.paused = before


def paused() -> bool:
    """Whether a check is running in this thread."""
    return getattr(_here, "paused", False)


def note(matrix: Tensor) -> None:
    """Tell every Watch that an op pruned matrix, a weight."""
    if _watches and not paused():
        address = matrix.data_ptr()
        for watch in list(_watches):
            watch._note(address)


def note_tokens(*, op: bool) -> None:
    """Tell every Watch that an op pruned tokens, or that an eager call of a layer will.

    Args:
        op: True if an op pruned, False if a layer was called.
    """
    if _watches and not paused():
        for watch in list(_watches):
            watch._note_tokens(op, not op)
