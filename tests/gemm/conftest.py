"""The real engine, and autotuners on the simulated library."""

import pytest

from semisparse.gemm.autotune.autotuner import Autotuner
from semisparse.gemm.autotune.store import Store
from semisparse.gemm.engine import Engine
from tests.gemm.simulated import make_engine
from tests.gemm.tuning import Timed


@pytest.fixture(scope="module")
def engine():
    made = Engine()
    verdict = made.available("cuda")
    assert verdict.ok, verdict.reason
    yield made
    made.close()


@pytest.fixture
def timed():
    return type("Timed", (Timed,), {"made": 0})  # a class of its own counts from 0


@pytest.fixture
def make_tuner(tmp_path, timed):
    """Makes autotuners that share a cache folder, as processes would."""

    def build(library=None, shipped=(), stored=True, **options):
        engine, library, runtime = make_engine(library)
        store = Store(tmp_path / "semisparse") if stored else None
        options = {"make_candidates": timed, "shipped": lambda: shipped} | options
        return Autotuner(engine, store, **options), library, runtime

    return build
