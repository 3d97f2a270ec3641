"""Set-up of the whole suite. The first lines decide how Triton runs, before anything can import it."""

import gc
import hashlib
import os
import sys
import tempfile
from pathlib import Path

import torch

# Workers take turns over the GPUs that tests/record_gpu.py found; CUDA reads the variable when it starts, below.
_worker, _gpus = os.environ.get("PYTEST_XDIST_WORKER", ""), int(os.environ.get("SEMISPARSE_TEST_GPUS", "1"))
if _worker.startswith("gw") and _gpus > 1:
    os.environ["CUDA_VISIBLE_DEVICES"] = str(int(_worker[2:]) % _gpus)

GPU_MISSING = not torch.cuda.is_available()  # asking this imports no triton (tests/arch/test_import_is_pure.py)
EVERY_CASE = os.environ.get("SEMISPARSE_EVERY_CASE") == "1"
"""Whether tests run that take too long for each change (`make test-all`)."""
if GPU_MISSING:
    os.environ["TRITON_INTERPRET"] = "1"

# torch.compile keeps compiled code between runs, under a key that does not hold the schemas of our ops.
_ops = sorted((Path(__file__).parents[1] / "src" / "semisparse" / "ops").glob("*.py"))
_digest = hashlib.sha256(b"".join(path.read_bytes() for path in _ops)).hexdigest()[:16]
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir()) / f"semisparse-inductor-{_digest}"))

from collections.abc import Iterator  # noqa: E402

import pytest  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

# One thread per process is fastest for our small shapes, and leaves the second core to a parallel worker.
torch.set_num_threads(1)

settings.register_profile("local", deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
settings.register_profile("ci", settings.get_profile("local"), derandomize=True, database=None)
settings.load_profile("ci" if os.environ.get("CI") else "local")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked gpu where there is none, unless the run says that there must be one."""
    if not GPU_MISSING or os.environ.get("SEMISPARSE_REQUIRE_GPU") == "1":
        return
    skip = pytest.mark.skip(reason="needs a CUDA device; SEMISPARSE_REQUIRE_GPU=1 makes this a failure")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


def pytest_collection_finish() -> None:
    """Imports are done: what they left is walked by no collection of garbage, and kernels are interpreted faster."""
    gc.collect()
    gc.freeze()
    if GPU_MISSING and "triton.runtime.interpreter" in sys.modules:
        from tests import interpreting

        interpreting.speed_up()


@pytest.fixture
def poison() -> Iterator[None]:
    """Uninitialised memory reads as NaN (integers: as their maximum), so a result that depends on it shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def packed_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The packed route is taken on the CPU: its ops have a CPU implementation, only the choice of route is forced."""
    from semisparse import routes
    from semisparse.errors import EngineError

    def packs(weight: torch.Tensor, dtype: torch.dtype, backend: str) -> bool:
        if backend == "cusparselt":
            raise EngineError("there is none")
        return dtype in (torch.float16, torch.bfloat16) and backend != "dense"

    monkeypatch.setattr(routes, "packs", packs)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of matrices of each call of ops.pack_many."""
    from semisparse import ops

    counts: list[int] = []
    original = ops.pack_many

    def counting(matrices: list[torch.Tensor], *args: object) -> None:
        counts.append(len(matrices))
        original(matrices, *args)

    monkeypatch.setattr(ops, "pack_many", counting)
    return counts


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test starts from the same random numbers, whatever ran before."""
    torch.manual_seed(0)
