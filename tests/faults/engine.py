"""Memory that runs out while algorithms are tuned, libraries that are missing or others, and compilers that fail."""

import ctypes.util
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from semisparse.errors import EngineError
from semisparse.gemm.autotune import tiles
from semisparse.gemm.autotune.autotuner import Autotuner
from semisparse.gemm.autotune.candidates import Candidates
from semisparse.gemm.autotune.store import Store
from semisparse.gemm.dispatch import multiply
from semisparse.gemm.engine import Engine
from semisparse.gemm.operands import Operands
from semisparse.native import loading
from semisparse.native.loading import LIBRARY
from semisparse.planning.problems import LinearProblem
from tests.faults.fault import Fault, ended, forked
from tests.gemm.simulated import (
    FORWARD,
    SimulatedLibrary,
    SimulatedRuntime,
    cuSPARSELtError,
    exact,
    make_engine,
    operands,
    unpack,
)
from tests.planning.simulated import measurer


class Run(Candidates):
    """Real checks, and made-up times of products that run: algorithm 4 is the fastest."""

    def time(self, algorithm: int | None, repeats: int, chunk: int | None = None) -> float:
        if algorithm is None:
            assert self._dense is not None
            self._dense()
            return 50.0
        self._run(self._problem, algorithm, self._operands, chunk)
        return 10.0 + abs(algorithm - 4)


def product(engine: Engine, tuner: Autotuner, packer: Engine) -> Any:
    """The choice for one product, which must be right bit for bit."""
    a, b, out, bias = operands(FORWARD)
    full = partial(unpack, rows=FORWARD.rows, columns=FORWARD.reduction, dtype=FORWARD.dtype)
    with mock.patch.dict(tiles.TILE, dict.fromkeys(tiles.TILE, 1)):  # small as it is, it is tuned
        choice = multiply(FORWARD, Operands(packer.compress(a), b, out, bias), full, engine=engine, tuner=tuner)
    assert torch.equal(out, exact(FORWARD, a, b, bias)), "a wrong product"
    return choice


def _tuner(engine: Engine, folder: Path) -> Autotuner:
    return Autotuner(engine, Store(folder / "semisparse"), make_candidates=Run, shipped=tuple)


def out_of_memory(count: int, folder: Path) -> dict[str, int]:
    """Memory runs out at one product of the tuning after the other, or for one algorithm at each of its products."""
    engine, library, _ = make_engine()
    product(engine, _tuner(engine, folder / "whole"), engine)
    products, dropped = len(library.products) - 1, 0  # the last one is the caller's
    for turn in range(count):
        engine, library, _ = make_engine()
        whole, only = turn % 2 == 0, turn // 2
        library.matmul = _short(library.matmul, 1 + only % products) if whole else library.matmul  # type: ignore[method-assign]
        if not whole:
            library.faults[only % 6] = _no_memory
        there = folder / str(turn)
        choice = product(engine, _tuner(engine, there), engine)
        assert choice.algorithm is not None, "all candidates are lost, and not one"
        if not whole:
            assert choice.algorithm != only % 6 and only % 6 in dict(choice.rejected), "the candidate is not dropped"
        if choice.note:
            assert not there.exists(), "a choice that lack of memory disturbed is kept for other processes"
            dropped += 1
        kept = sum(kind == "plan" for kind, _ in library.live.values())
        assert kept == 1, f"{kept} plans are alive, and one is used"
        engine.close()
        assert library.live == {}, "something of the library is not given back"
    return {"tunings that dropped a candidate and went on": dropped, "wrong products": 0}


def _short(real: Callable[..., None], number: int) -> Callable[..., None]:
    calls = 0

    def counted(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == number:
            _no_memory()
        real(*arguments)

    return counted


def _no_memory(*arguments: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def _raising(error: BaseException) -> Callable[..., Any]:
    def fails(*arguments: Any) -> Any:
        raise error

    return fails


def _lacking(name: str) -> type[SimulatedLibrary]:
    return type("Lacking", (SimulatedLibrary,), {name: property()})


def _broken(name: str, error: BaseException) -> SimulatedLibrary:
    library = SimulatedLibrary()
    setattr(library, name, _raising(error))
    return library


LIBRARIES: dict[str, Callable[[], Any]] = {
    "no bindings": _raising(ImportError("No module named 'nvmath'")),
    "no library": partial(_broken, "init", RuntimeError("libcusparseLt.so.0 not found")),
    "no file": partial(_broken, "init", OSError("libcusparseLt.so.0: cannot open shared object file")),
    "a file that is no library": partial(_broken, "init", OSError("invalid ELF header")),
    "a version before": partial(SimulatedLibrary, version=703),
    "no version": partial(_broken, "get_version", cuSPARSELtError(10)),
    "a handle that is refused": partial(_broken, "init", cuSPARSELtError(10)),
    "an object of another kind": object,
    **{f"no {name}": _lacking(name) for name in ("init", "matmul_alg_selection_destroy")},
}


def libraries(count: int, folder: Path) -> dict[str, int]:
    """Without a usable cuSPARSELt a product is masked dense, and one that asks for it is a typed error."""
    packer = make_engine()[0]
    for turn in range(count):
        name = list(LIBRARIES)[turn % len(LIBRARIES)]
        engine = Engine(LIBRARIES[name], SimulatedRuntime())
        verdict = engine.available()
        assert not verdict.ok and verdict.reason.isprintable(), f"{name}: {verdict}"
        tuner = _tuner(engine, folder)
        assert product(engine, tuner, packer).algorithm is None
        a, b, out, bias = operands(FORWARD)
        try:
            given = Operands(packer.compress(a), b, out, bias)
            multiply(FORWARD, given, _raising(AssertionError("unpacked")), "cusparselt", engine=engine, tuner=tuner)
        except EngineError as error:
            assert verdict.reason[:60] in str(error), f"{name}: {error}"
        else:
            raise AssertionError(f"{name}: a product ran")
    return {"masked dense, and a typed error where it was asked for": count}


def native_files(count: int, folder: Path) -> dict[str, int]:
    """Other files in the place of the native library: refused with a reason, and no crash."""
    draw = random.Random(count)
    others = [b"", b"hostile", b"\x7fELF", bytes(4096), Path(__file__).read_bytes()]
    if LIBRARY.exists():
        whole = LIBRARY.read_bytes()
        others += [whole[64:], *(whole[: draw.randrange(64, len(whole))] for _ in range(count // 3))]
    libraries = [path for name in ("c", "m", "z") if (path := ctypes.util.find_library(name))]
    path = folder / "launch.so"
    for turn in range(count):
        target = path
        if turn < len(libraries):
            target = Path(libraries[turn])  # a real library without our functions
        elif turn < len(libraries) + len(others):
            path.write_bytes(others[turn - len(libraries)])
        else:
            path.write_bytes(draw.randbytes(draw.randrange(1, 10_000)))

        def refused(target: Path = target) -> None:
            loading.LIBRARY = target
            found, reason = loading._load.__wrapped__()
            assert found is None and reason

        code = ended(forked(refused))
        assert code == 0, f"case {turn}: {'it is taken' if code == 1 else f'the process ended with {code}'}"
    return {"refused with a reason": count}


def compilers(count: int, folder: Path) -> dict[str, int]:
    """torch.compile fails for one candidate of a plan after the other: it is left out, with its reason."""
    problem, kinds = LinearProblem(16, 32, 32), (RuntimeError, ImportError, torch.OutOfMemoryError, AssertionError)
    names = list(measurer(mode="compiled").candidates)
    for turn in range(count):
        lost, kind = names[turn % len(names)], kinds[turn % len(kinds)]
        made = 0

        def compiles(function: Callable[..., Any], turn: int = turn, kind: type[Exception] = kind) -> Any:
            nonlocal made
            made += 1
            return _raising(kind("no compiler")) if made == 2 + turn % len(names) else function  # 1 is dense

        found = measurer(mode="compiled", compile=compiles).measure([problem])[problem]
        assert lost in found.dropped and lost not in found.times, f"{lost}: {found.dropped}"
        assert "dense" in found.times and len(found.times) > 1
        assert not found.final, "what a failure disturbed is kept for other processes"
    return {"candidates left out, and the others measured": count}


FAULTS = [
    Fault("out of memory while tuning", "", "the candidate is dropped, the product is right, no plan leaks", 8, 120,
          out_of_memory, "failures"),
    Fault("cuSPARSELt is missing or another one", "", "masked dense with the reason; EngineError where it is asked for",
          len(LIBRARIES), len(LIBRARIES), libraries, "libraries"),
    Fault("another file as the native library", "", "not used, with the reason", 4, 60, native_files, "files"),
    Fault("torch.compile fails for a candidate of a plan", "", "it is left out with the reason", 3, 40, compilers,
          "failures"),
]  # fmt: skip
