"""Small products are tuned here, as those of real sizes are; test_tiles.py has the rule."""

import pytest

from semisparse.gemm.autotune import tiles


@pytest.fixture(autouse=True)
def small_tiles(request, monkeypatch):
    """Kernels of the simulated library have no tiles: nothing is too short for them. Those of a GPU have."""
    if request.module.__name__.rpartition(".")[2] != "test_tiles" and not request.node.get_closest_marker("gpu"):
        monkeypatch.setattr(tiles, "TILE", dict.fromkeys(tiles.TILE, 1))
