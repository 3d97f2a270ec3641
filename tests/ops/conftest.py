"""The ops of fp8 as on CUDA, on the CPU: products by the simulated library, packed by its compressor."""

import pytest

from semisparse.formats.packed import PackedFormat
from semisparse.gemm import dispatch
from semisparse.gemm.autotune.autotuner import Autotuner
from semisparse.ops import fp8_sampling, packing, products
from tests.gemm.simulated import make_engine


@pytest.fixture
def simulated_fp8(monkeypatch) -> Autotuner:
    """The autotuner of its engine; tuning is off."""
    monkeypatch.setenv("SEMISPARSE_TUNE", "0")
    engine, _, _ = make_engine()
    tuner = Autotuner(engine, None, shipped=tuple)
    for module in (packing, products, fp8_sampling):
        monkeypatch.setattr(module, "packed_format", lambda *_: PackedFormat("compressor", None, "simulated"))
        monkeypatch.setattr(module, "engine", lambda: engine)
    monkeypatch.setattr(dispatch, "process_engine", lambda: engine)
    monkeypatch.setattr(dispatch, "autotuner", lambda: tuner)
    return tuner
