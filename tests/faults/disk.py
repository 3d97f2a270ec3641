"""A disk that is full or fails while a file is saved: a typed error or a warning, and what was there stays."""

import errno
import json
import os
import resource
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

from semisparse.errors import SemiSparseError
from tests.faults.fault import Fault, ended, forked
from tests.faults.kinds import KINDS, Kind, Which

CALLS = ("open", "write", "fsync", "replace")
"""What a save asks of the system."""
ERRORS = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS)


@contextmanager
def failing(call: str, number: int) -> Iterator[None]:
    """A call of the system raises OSError; "write" fails for a file that is open already."""

    def fails(*arguments: object, **keywords: object) -> Any:
        raise OSError(number, os.strerror(number))

    if call == "write":
        with limited(0):
            yield
        return
    real = os.open

    def opens(path: Any, flags: int, *rest: Any, **keywords: Any) -> int:
        return fails() if flags & os.O_CREAT else real(path, flags, *rest, **keywords)

    with patch.object(os, call, opens if call == "open" else fails):
        yield


@contextmanager
def limited(size: int) -> Iterator[None]:
    """No file grows beyond size bytes: what is written further is refused as on a disk that is full."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def _said(kind: Kind, folder: Path) -> str:
    """How a save ended: "saved", "typed" or "quiet" (a warning or a line of the log, and training goes on)."""
    assert kind.write is not None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kind.write(folder, 1)
    except RuntimeWarning:
        return "quiet"
    except SemiSparseError:
        return "typed"
    return "saved"


def full(kind: Kind, count: int, folder: Path) -> dict[str, int]:
    """Fail in turns at each call, with each error, and at a random size of the file."""
    assert kind.write is not None
    quiet = kind.name in ("tuning cache", "times of a plan")  # training goes on without them
    sizes = []
    for which in (1, 0):
        kind.write(folder, cast(Which, which))
        sizes.append((folder / kind.file).stat().st_size)
    before, size = kind.read(folder), min(sizes)
    ways: list[partial[Any]] = [partial(failing, call, number) for number in ERRORS for call in CALLS]
    ways += [partial(limited, (size - 1) * step // 16) for step in range(17)]
    for number in range(count):
        way = ways[(number * 7) % len(ways)]  # 7 and the number of ways share no factor
        with way():
            said = _said(kind, folder)
        assert said == {"tuning cache": "quiet", "times of a plan": "saved"}.get(kind.name, "typed"), f"{way}: {said}"
        assert kind.read(folder) == before, f"{way}: what was there is gone"
        assert [path.name for path in folder.iterdir()] == [kind.file], f"{way}: something is left"
    kind.write(folder, 1)
    assert kind.read(folder) != before, "nothing can be saved once there is room"
    return {"typed errors": 0 if quiet else count, "warnings": count if quiet else 0, "old files lost": 0}


def apart(kind: Kind, count: int, folder: Path) -> dict[str, int]:
    """In a process of its own, because limits and signals are the whole process's."""
    answer = folder.parent / f"{folder.name}.answer"
    child = forked(lambda: answer.write_text(json.dumps(full(kind, count, folder))))
    try:
        assert ended(child) == 0, "see the traceback above"
        found: dict[str, int] = json.loads(answer.read_text())
        return found
    finally:
        answer.unlink(missing_ok=True)


FAULTS = [
    Fault("full or failing disk", kind.name,
          "a typed error (caches: a warning, and training goes on); the old file whole", 5, 33, partial(apart, kind),
          "failures")
    for kind in KINDS
    if kind.write is not None
]  # fmt: skip
