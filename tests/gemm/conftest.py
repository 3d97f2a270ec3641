"""The real engine, and tuners on the simulated library."""

import pytest

from semisparse.gemm import shipped
from semisparse.gemm.engine import Engine
from semisparse.gemm.tuner import Tuner
from semisparse.gemm.tuning_cache import TuningCache
from tests.gemm.simulated import make_engine
from tests.gemm.tuning import Timed, table


@pytest.fixture(scope="module")
def engine():
    made = Engine()
    verdict = made.available("cuda")
    assert verdict.ok, verdict.reason
    yield made
    made.close()


@pytest.fixture
def timed():
    return type("Timed", (Timed,), {})


@pytest.fixture
def make_tuner(tmp_path, timed):
    """Makes tuners that share a cache folder, as processes would."""

    def build(library=None, rows=(), cached=True, **options):
        engine, library, runtime = make_engine(library)
        cache = TuningCache(tmp_path / "semisparse") if cached else None
        options = {"make_trial": timed, "rows": lambda: shipped.parse(table(rows))} | options
        return Tuner(engine, cache, **options), library, runtime

    return build
