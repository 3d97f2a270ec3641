"""The native library as it was built for the package under test, and the same ops on the CPU."""

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from semisparse import ops
from semisparse.formats.layout import SM90_8BIT, SM90_16BIT, compressed_bytes
from semisparse.formats.packed import PackedFormat
from semisparse.gemm import dispatch
from semisparse.gemm.autotune.algorithm import Choice
from semisparse.gemm.engine import Engine
from semisparse.native.loading import LIBRARY
from semisparse.ops import fp8_packed, fp8_sampled_grad, fp8_sampling, packing, prepare, products, sampling
from tests.gemm import simulated
from tests.gemm.simulated import SimulatedLibrary, make_engine
from tests.native.foreign import sm90_pack, sm90_unpack
from tests.native.hot import Hot, installed


@pytest.fixture(scope="session")
def library() -> Path:
    """launch.so; where it was not built, the test is skipped, unless the run says that it must be there."""
    if not LIBRARY.is_file():
        if os.environ.get("SEMISPARSE_REQUIRE_NATIVE") == "1":
            pytest.fail(f"{LIBRARY} is not there, and SEMISPARSE_REQUIRE_NATIVE is 1")
        pytest.skip("the native library was not built; SEMISPARSE_REQUIRE_NATIVE=1 makes this a failure")
    return LIBRARY


class Bench(NamedTuple):
    """The hot ops in C++ with an engine of their own, whose library runs on the CPU."""

    hot: Hot
    engine: Engine
    library: SimulatedLibrary


@pytest.fixture
def settings() -> dict[str, Any]:
    """Of the simulated library; a test overrides it by parametrize."""
    return {}


@pytest.fixture
def choice() -> Choice:
    """What the autotuner chose for every problem; a file of tests overrides it."""
    return Choice(0, 0, None, None, "tuned")


def _without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parts of fp8_sampled_grad_weight without kernels, which take seconds in the interpreter."""
    parts = {"sample_fp8": ops.sample_fp8, "quantise": ops.quantise, "rescale": ops.rescale}
    parts |= {"dense_product": ops.fp8_dense_product, "rescale_in_place": ops.rescale_}
    for name, function in parts.items():
        monkeypatch.setattr(fp8_sampled_grad, f"_cuda_{name}", function)


@pytest.fixture
def bench(settings: dict[str, Any], choice: Choice, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    """Nothing is prepared at first. Python's products run on the engine, and hand their plans over."""
    hot = installed()
    for name, function in (("pack", sm90_pack), ("unpack", sm90_unpack), ("packed_size", compressed_bytes)):
        monkeypatch.setattr(simulated, name, function)
    engine, library, _ = make_engine(SimulatedLibrary(**settings))
    tuner = SimpleNamespace(known=lambda problem, index: choice)
    layouts = {1: SM90_8BIT, 2: SM90_16BIT}

    def written(index: int, dtype: torch.dtype, *_: object) -> PackedFormat:
        return PackedFormat("reference", layouts[dtype.itemsize], "simulated")

    for module in (packing, products, sampling):
        monkeypatch.setattr(module, "packed_format", written)
    monkeypatch.setattr(products, "_cuda_pack", ops.pack)
    _without_kernels(monkeypatch)
    for module in (products, prepare, sampling, fp8_packed, fp8_sampling):
        monkeypatch.setattr(module, "engine", lambda: engine)
    monkeypatch.setattr(dispatch, "process_engine", lambda: engine)
    for module in (dispatch, prepare):
        monkeypatch.setattr(module, "autotuner", lambda: tuner)
    monkeypatch.setattr(prepare, "_connected", lambda: hot.interface)
    monkeypatch.setattr(hot, "python", dict(hot.python))
    hot.foreign.reset(library)
    hot.asked.clear()
    yield Bench(hot, engine, library)
    assert not hot.foreign.errors
    assert not hot.foreign.open
    engine.close()
    assert [kind for kind, _ in library.live.values()] == []
    hot.interface.drop_plan(None)  # masked-dense products
    hot.forget_launches()
    assert hot.interface.prepared() == 0
