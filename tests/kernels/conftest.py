"""Fewer cases where Triton's interpreter runs kernels, a thousand times slower than a GPU does."""

from collections import Counter
from pathlib import Path

import pytest

from tests.conftest import EVERY_CASE, GPU_MISSING

FOLDER = Path(__file__).parent
FEW = 4
"""Tests with at most as many cases keep all."""
KEPT = 3
"""One case in as many stays, the first of them first."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out two cases in three of a test with many; on a GPU, or with SEMISPARSE_EVERY_CASE=1, all of them run."""
    if EVERY_CASE or not GPU_MISSING:
        return
    ours = [item for item in items if item.path.parent == FOLDER]
    cases = Counter(_function(item) for item in ours)
    seen: Counter[str] = Counter()
    left_out = []
    for item in ours:
        name = _function(item)
        if cases[name] > FEW and seen[name] % KEPT:
            left_out.append(item)
        seen[name] += 1
    if left_out:
        gone = set(map(id, left_out))
        items[:] = [item for item in items if id(item) not in gone]
        config.hook.pytest_deselected(items=left_out)


def _function(item: pytest.Item) -> str:
    return item.nodeid.partition("[")[0]
