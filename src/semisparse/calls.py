"""Which weights reached an op: evidence that a layer was called, also from inside compiled code.

The flag that a layer sets in eager forward is not set under torch.compile: a write there would cost host time at every
call and break strict export and checkpointed regions. The ops run in Python either way and see the weight itself.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakSet

from torch import Tensor


class Watch:
    """The addresses of the matrices that ops have read while this object lived."""

    __slots__ = ("__weakref__", "_seen")

    def __init__(self) -> None:
        self._seen: set[int] = set()
        _watches.add(self)

    def saw(self, matrix: Tensor) -> bool:
        """Whether an op has read the memory that matrix starts at. False for shards and fakes, which start nowhere."""
        try:
            return matrix.data_ptr() in self._seen
        except RuntimeError:  # no storage: a fake or a wrapper
            return False

    def _note(self, address: int) -> None:
        self._seen.add(address)


# Empty but between the start of a schedule and its first sparse step: an address that is remembered for longer could be
# another tensor's by then.
_watches: WeakSet[Watch] = WeakSet()


@contextmanager
def unnoticed() -> Iterator[None]:
    """Inside the block ops are not noted: their calls are a check's, not the training's."""
    global _paused
    before, _paused = _paused, True
    try:
        yield
    finally:
        _paused = before


_paused = False


def note(matrix: Tensor) -> None:
    """Tell those who watch that an op read this matrix."""
    if _watches and not _paused:
        address = matrix.data_ptr()
        for watch in list(_watches):
            watch._note(address)
