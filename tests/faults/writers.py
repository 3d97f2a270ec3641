"""Many processes that write and read one folder of stored results at the same time."""

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from semisparse.gemm.autotune.algorithm import Choice
from semisparse.gemm.autotune.store import Store
from semisparse.planning.store import Measurement, PlanStore
from semisparse.planning.timing import Times
from tests.faults.fault import Fault, ended, forked
from tests.faults.kinds import KEY, PLAN_KEY

WRITERS, SHARED, OWN = 8, 3, 4


class Choices:
    """The tuning cache, as numbers by name."""

    def __init__(self, folder: Path) -> None:
        self.store = Store(folder)

    def save(self, name: int, writer: int, turn: int) -> None:
        """Under a name: who wrote, and when."""
        self.store.save(KEY | {"columns": name}, Choice(writer, writer, 1.0 + turn, None, "tuned"))

    def load(self, name: int) -> tuple[int, int] | None:
        """Who wrote it and when; None if there is nothing."""
        found = self.store.load(KEY | {"columns": name})
        return None if found is None else (found.algorithm or 0, round((found.sparse_us or 0) - 1))


class Measurements:
    """The times of plans, as numbers by name."""

    def __init__(self, folder: Path) -> None:
        self.store = PlanStore(folder)

    def save(self, name: int, writer: int, turn: int) -> None:
        """Under a name: who wrote, and when."""
        self.store.save({**PLAN_KEY, "name": name}, Measurement({"dense": Times(float(writer), float(turn))}))

    def load(self, name: int) -> tuple[int, int] | None:
        """Who wrote it and when; None if there is nothing."""
        found = self.store.load({**PLAN_KEY, "name": name})
        return None if found is None else (int(found.times["dense"].ms), int(found.times["dense"].device_ms or 0))


def _write(kind: Callable[[Path], Any], folder: Path, rounds: int, writer: int) -> None:
    warnings.simplefilter("error", RuntimeWarning)
    for turn in range(rounds):
        results = kind(folder)
        for name in range(SHARED):
            results.save(name, writer, turn)
            found = results.load(name)  # of any writer, and whole
            assert found is not None and found[0] in range(WRITERS) and found[1] in range(rounds), found
        for name in range(OWN):
            results.save(100 * (1 + writer) + name, writer, turn)
            assert results.load(100 * (1 + writer) + name) == (writer, turn), "an own result is lost"


def at_once(kind: Callable[[Path], Any], count: int, folder: Path) -> dict[str, int]:
    """Eight processes write what they share and what each has alone, in each round all of it."""
    there = folder / "cache"
    children = [forked(partial(_write, kind, there, count, writer)) for writer in range(WRITERS)]
    assert [ended(child) for child in children] == [0] * WRITERS, "a writer failed"
    results = kind(there)
    shared = [results.load(name) for name in range(SHARED)]
    assert all(found is not None and found[1] == count - 1 for found in shared), f"not of a last round: {shared}"
    for writer in range(WRITERS):
        assert all(results.load(100 * (1 + writer) + name) == (writer, count - 1) for name in range(OWN))
    files = len(list(there.iterdir()))
    assert files == SHARED + WRITERS * OWN, "a rest of a save is left"
    return {"results lost": 0, "results kept": files}


FAULTS = [
    Fault("8 writers of one folder", name, "each result is there, whole, of its last writer", 3, 50,
          partial(at_once, kind), "rounds")
    for name, kind in (("tuning cache", Choices), ("times of plans", Measurements))
]  # fmt: skip
