"""When the engine can be used, which reason it gives where not, and that the real bindings are as we take them."""

import os

import pytest
import torch

from semisparse.errors import EngineError
from semisparse.gemm import cusparselt
from semisparse.gemm.engine import Engine
from tests import fresh
from tests.gemm.simulated import SimulatedLibrary, SimulatedRuntime, make_engine, two_of_four

BF16 = torch.bfloat16


def unavailable(engine: Engine) -> str:
    """The reason, checked to be the one that using the engine anyway gives."""
    verdict = engine.available()
    assert not verdict.ok
    assert engine.available() is verdict
    with pytest.raises(EngineError) as error:
        engine.compress(two_of_four(16, 16, BF16))
    assert verdict.reason in str(error.value)
    assert "backend='dense'" in str(error.value)
    return verdict.reason


def raising(error: Exception):
    def fail(*_):
        raise error

    return fail


def test_nvmath_missing():
    assert "pip install" in unavailable(Engine(raising(ImportError("No module named 'nvmath'")), SimulatedRuntime()))


def test_nvmath_too_old():
    class Old(SimulatedLibrary):
        matmul_alg_selection_destroy = property()

    assert "has no matmul_alg_selection_destroy" in unavailable(Engine(Old, SimulatedRuntime()))


def test_library_missing():
    library = SimulatedLibrary()
    library.init = raising(RuntimeError("libcusparseLt.so.0 not found"))
    assert "libcusparseLt.so.0 not found" in unavailable(Engine(lambda: library, SimulatedRuntime()))


def test_library_too_old():
    engine, library, _ = make_engine(SimulatedLibrary(version=703))
    assert "0.7.3 is older than 0.8.0" in unavailable(engine)
    assert engine.available().version == 703
    assert library.live == {}


def test_obstacles_of_the_device_come_first():
    engine, library, runtime = make_engine()
    runtime.trouble = "the GPU has compute capability 7.5, 2:4 products need 8.0"
    assert unavailable(engine) == runtime.trouble
    assert library.made == 0


def test_a_device_of_another_kind():
    engine, _, _ = make_engine()
    assert "meta" in engine.available("meta").reason
    assert not engine.available("meta").ok


def test_nothing_unforeseen_escapes():
    engine, _, runtime = make_engine()
    runtime.obstacle = raising(RuntimeError("unforeseen"))
    verdict = engine.available()
    assert (verdict.ok, verdict.reason) == (False, "RuntimeError: unforeseen")


def test_available_says_which_version_and_probes_once():
    engine, library, _ = make_engine(SimulatedLibrary(version=801))
    assert engine.available() == cusparselt.Availability(True, "cuSPARSELt 0.8.1", 801)
    assert engine.available() == engine.available(-1)
    assert library.made == 1
    assert library.live == {}


def test_the_real_engine_answers_without_a_gpu():
    verdict = Engine().available()
    assert verdict.ok == torch.cuda.is_available() or verdict.reason
    assert Engine().available("cpu").ok is False


def test_making_the_engine_imports_and_asks_nothing():
    code = (
        "import sys\n"
        "from semisparse.gemm.engine import engine\n"
        "engine()\n"
        "import torch\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert not any(name.startswith('nvmath') for name in sys.modules)\n"
    )
    done = fresh.run("-c", code)
    assert done.returncode == 0, done.stderr


def test_two_files_import_the_bindings():
    import semisparse

    root = os.path.dirname(semisparse.__file__)
    naming = []
    for folder, _, files in os.walk(root):
        for name in files:
            if name.endswith(".py"):
                with open(os.path.join(folder, name), encoding="utf-8") as file:
                    if "import nvmath" in (text := file.read()) or "from nvmath" in text:
                        naming.append(name)
    assert sorted(naming) == ["addresses.py", "cusparselt.py"]


def test_the_constants_agree_with_the_real_bindings():
    bindings = pytest.importorskip("nvmath.bindings.cusparseLt", reason="nvmath-python is not installed")
    assert cusparselt._CONFIG_ID == bindings.MatmulAlgAttribute.CONFIG_ID
    assert cusparselt._CONFIG_MAX_ID == bindings.MatmulAlgAttribute.CONFIG_MAX_ID
    assert cusparselt._BIAS_POINTER == bindings.MatmulDescAttribute.BIAS_POINTER
    assert cusparselt._COMPUTE_32F == bindings.ComputeType.COMPUTE_32F
    assert cusparselt._HALF_SPARSE == bindings.Sparsity.SPARSITY_50_PERCENT
    assert cusparselt._DEFAULT == bindings.MatmulAlg.DEFAULT
    size = bindings.get_matmul_alg_attribute_dtype(bindings.MatmulAlgAttribute.CONFIG_ID)(0).nbytes
    assert size == 4
    assert bindings.get_matmul_desc_attribute_dtype(bindings.MatmulDescAttribute.BIAS_POINTER)(0).nbytes == 8
    called = [name for name in vars(SimulatedLibrary) if not name.startswith("_") and name != "cuSPARSELtError"]
    assert [name for name in called if not hasattr(bindings, name)] == []
