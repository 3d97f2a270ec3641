"""The end of a process at a random moment while it saves a file: the old version or the new one is there, whole.

By kill -9, or by a SIGTERM that a handler makes a SystemExit of, as job systems and trainers do.
"""

import os
import random
import signal
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import cast

from tests.faults.fault import Fault, ended, forked
from tests.faults.kinds import KINDS, Kind, Which


def kills(how: signal.Signals, kind: Kind, count: int, folder: Path) -> dict[str, int]:
    """End a process that saves two versions in turns, and look after each end."""
    assert kind.write is not None
    versions = []
    for which in (0, 1):
        kind.write(folder, cast(Which, which))
        versions.append(kind.read(folder))
    assert versions[0] != versions[1]
    begin = time.monotonic()
    for which in (0, 1, 0, 1):
        kind.write(folder, cast(Which, which))
    each = (time.monotonic() - begin) / 4
    draw, seen, left = random.Random(count), [0, 0], 0
    for _ in range(count):
        heard, told = os.pipe()
        child = forked(partial(_save_for_ever, kind, folder, told))
        for _ in range(1 + draw.randrange(4)):  # whole saves, so that both versions are met on a busy machine, too
            os.read(heard, 1)
        time.sleep(draw.uniform(0, 2 * each))
        os.kill(child, how)
        assert ended(child) == (-how if how == signal.SIGKILL else 0)
        os.close(heard)
        os.close(told)
        left += len(list(folder.iterdir())) - 1
        seen[versions.index(kind.read(folder))] += 1
        kind.write(folder, 1)
        assert kind.read(folder) == versions[1]
        rest = [path.name for path in folder.iterdir() if path.name != kind.file]
        assert rest == [], "the next save leaves what a killed one left"
    return {"unreadable": 0, "orphans that the next save removed": left}


def _save_for_ever(kind: Kind, folder: Path, told: int) -> None:
    assert kind.write is not None
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    with suppress(SystemExit):
        while True:
            for which in (0, 1):
                kind.write(folder, cast(Which, which))
                os.write(told, b".")


FAULTS = [
    Fault("kill -9 while saving", kind.name, "the old version or the new one, whole; the next save removes the rest",
          5, 200, partial(kills, signal.SIGKILL, kind), "kills")
    for kind in KINDS
    if kind.write is not None
] + [
    Fault("SIGTERM that ends a save by an exception", kind.name,
          "the old version or the new one, whole; the next save removes the rest", 1, 48,
          partial(kills, signal.SIGTERM, kind), "signals")
    for kind in KINDS
    if kind.write is not None
]  # fmt: skip
