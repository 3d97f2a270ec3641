"""The engine and the library layer under it, on the simulated library."""

import gc
import os
import subprocess
import sys
import threading
import weakref
from dataclasses import replace

import pytest
import torch

from semisparse.errors import EngineError, ShapeError, TensorError
from semisparse.gemm import cusparselt
from semisparse.gemm import problem as problems
from semisparse.gemm.engine import Engine
from semisparse.gemm.problem import Problem
from tests.gemm.simulated import SimulatedLibrary, SimulatedRuntime, exact, make_engine, operands, two_of_four

BF16 = torch.bfloat16
PRODUCTS = {
    "forward": problems.forward(24, 32, 48, BF16),
    "forward with bias": problems.forward(24, 32, 48, torch.float16, bias=True),
    "grad_input": problems.grad_input(24, 32, 48, BF16),
    "activation_forward": problems.activation_forward(24, 32, 48, BF16),
    "activation_weight": problems.activation_weight(24, 32, 48, torch.float16),
}
FORWARD = PRODUCTS["forward"]


def run(engine: Engine, problem: Problem, algorithm: int = 0) -> None:
    """One product on fresh operands, checked bit for bit."""
    a, b, out, bias = operands(problem)
    engine.matmul(problem, algorithm, engine.compress(a), b, out, bias)
    assert torch.equal(out, exact(problem, a, b, bias))


# ---- products


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("workspace", [0, 96])
def test_each_product_is_described_so_that_the_library_computes_it(name, workspace):
    engine, library, runtime = make_engine(SimulatedLibrary(workspace=workspace))
    run(engine, PRODUCTS[name], algorithm=3)
    assert library.products == [3]
    assert library.streams == [runtime.stream(-1)]
    assert all(bool(address) == bool(workspace) for address in library.workspaces)


@pytest.mark.parametrize("follows_bias", [True, False])
@pytest.mark.parametrize("capturing", [True, False])
def test_each_call_adds_its_own_bias_whether_or_not_a_plan_can_be_rebound(follows_bias, capturing):
    engine, library, runtime = make_engine(SimulatedLibrary(follows_bias=follows_bias))
    problem = PRODUCTS["forward with bias"]
    a, b, out, bias = operands(problem)
    packed = engine.compress(a)
    runtime.is_capturing = capturing
    for step in range(4):
        moved = bias + step
        engine.matmul(problem, 0, packed, b, out, moved)
        assert torch.equal(out, exact(problem, a, b, moved))
    assert engine.plan_count(-1) == 1
    built = sum(kind == "plan" for kind, _ in library.log) + 1
    assert (built <= 2) == (follows_bias and not capturing)  # one, and one for the try


def test_the_current_stream_is_read_at_each_call():
    engine, library, runtime = make_engine()
    run(engine, FORWARD)
    runtime.stream = lambda index: 4242
    run(engine, FORWARD)
    assert library.streams == [6_999, 4242]


def test_the_device_is_made_current_for_a_call_and_restored_even_after_an_error():
    engine, library, runtime = make_engine()
    runtime.device_now = 5
    run(engine, FORWARD)
    assert runtime.device_now == 5
    assert -1 in runtime.exchanges
    library.faults[1] = lambda out: (_ for _ in ()).throw(library.cuSPARSELtError(10))
    with pytest.raises(EngineError):
        run(engine, FORWARD, algorithm=1)
    assert runtime.device_now == 5


def test_no_tensor_is_kept():
    engine, _, _ = make_engine(SimulatedLibrary(workspace=64))
    problem = PRODUCTS["forward with bias"]
    a, b, out, bias = operands(problem)
    packed = engine.compress(a)
    engine.matmul(problem, 0, packed, b, out, bias)
    watched = [weakref.ref(tensor) for tensor in (packed, b, out, bias)]
    del packed, b, out, bias
    gc.collect()
    assert [reference() for reference in watched] == [None] * 4


# ---- bad operands


def spoiled(name: str, how: str) -> dict[str, torch.Tensor | None]:
    """Operands of the biased forward problem with one of them spoiled."""
    problem = PRODUCTS["forward with bias"]
    a, b, out, bias = operands(problem)
    given = {"packed": make_engine()[0].compress(a), "b": b, "out": out, "bias": bias}
    tensor = given[name]
    given[name] = {
        "short": lambda: tensor[:-1].clone(),
        "long": lambda: torch.cat([tensor, tensor[:1]]),
        "dtype": lambda: tensor.to(torch.float32) if name != "packed" else tensor.view(torch.int8),
        "stride": lambda: torch.stack([tensor, tensor], dim=-1)[..., 0],
        "shift": lambda: torch.cat([tensor.flatten(), tensor.flatten()])[1 : 1 + tensor.numel()].view(tensor.shape),
        "missing": lambda: None,
    }[how]()
    return given


@pytest.mark.parametrize("name", ["packed", "b", "out", "bias"])
@pytest.mark.parametrize("how", ["short", "long", "dtype", "stride", "shift"])
def test_an_operand_that_does_not_fit_is_an_error_and_never_read(name, how):
    engine, library, _ = make_engine()
    given = spoiled(name, how)
    wrong_size = how in ("short", "long")
    with pytest.raises(ShapeError if wrong_size else TensorError, match=rf"^{name} "):
        engine.matmul(PRODUCTS["forward with bias"], 0, **given)
    assert library.products == []
    run(engine, PRODUCTS["forward with bias"])  # nothing wrong was left behind


def test_a_missing_and_an_unasked_bias_are_errors_and_leave_no_plan():
    engine, library, _ = make_engine()
    with pytest.raises(TensorError, match="bias=None"):
        engine.matmul(PRODUCTS["forward with bias"], 0, **spoiled("bias", "missing"))
    a, b, out, _ = operands(FORWARD)
    with pytest.raises(TensorError, match=r"bias=\(32,\)"):
        engine.matmul(FORWARD, 0, engine.compress(a), b, out, torch.zeros(32, dtype=BF16))
    assert library.products == []
    assert engine.plan_count(-1) == 0


def test_sizes_the_library_cannot_take_are_refused_before_it_is_asked():
    engine, library, _ = make_engine()
    problem = replace(FORWARD, columns=20)
    _, b, out, _ = operands(problem)
    with pytest.raises(EngineError, match="columns=20 is no multiple of 8; use the masked-dense"):
        engine.matmul(problem, 0, torch.zeros(1, dtype=torch.uint8), b, out)
    assert not any(kind == "matmul" for kind, _ in library.live.values())


# ---- errors of the library


@pytest.mark.parametrize("kind", ["handle", "matrix", "matmul", "selection", "plan"])
def test_a_refusal_while_a_plan_is_made_is_an_engine_error_and_leaks_nothing(kind):
    engine, library, _ = make_engine()
    packed = engine.compress(two_of_four(32, 48, BF16))
    engine.close()
    _, b, out, _ = operands(FORWARD)
    library.refuse[kind] = 10
    with pytest.raises(EngineError, match=r"CUSPARSE_STATUS_NOT_SUPPORTED, status 10.*engine='dense'"):
        engine.matmul(FORWARD, 0, packed, b, out)
    library.refuse.clear()
    assert {kind for kind, _ in library.live.values()} <= {"handle"}
    run(engine, FORWARD)


def test_an_unknown_algorithm_is_an_engine_error_that_names_it():
    engine, _, _ = make_engine()
    with pytest.raises(EngineError, match="no plan with algorithm 99 for 32x48"):
        run(engine, FORWARD, algorithm=99)


def test_a_status_without_a_name_is_still_reported():
    engine, library, _ = make_engine()
    library.refuse["plan"] = 77
    with pytest.raises(EngineError, match="status 77"):
        run(engine, FORWARD)


def test_a_plan_that_cannot_be_freed_is_warned_of_and_the_product_stands():
    engine, library, _ = make_engine()
    engine.MAX_PLANS = 1
    run(engine, FORWARD, algorithm=0)
    library.refuse["destroy selection"] = 10
    with pytest.warns(RuntimeWarning, match="leaks host memory"):
        run(engine, FORWARD, algorithm=1)
    assert sum(kind == "matrix" for kind, _ in library.live.values()) == 3  # the rest of the old plan was freed


# ---- life of plans and handles


def test_the_least_recently_used_plan_makes_room_and_is_freed_in_reverse_order():
    engine, library, _ = make_engine()
    engine.MAX_PLANS = 2
    for algorithm in (0, 1, 0):
        run(engine, FORWARD, algorithm)
    plans = [number for number, (kind, _) in library.live.items() if kind == "plan"]
    library.log.clear()
    run(engine, FORWARD, 2)
    freed = [(kind, number) for kind, number in library.log if kind != "matrix" or number < max(plans)]
    assert [kind for kind, _ in freed][:6] == ["plan", "selection", "matmul", "matrix", "matrix", "matrix"]
    assert freed[0][1] == plans[1]  # algorithm 1, although it was made after algorithm 0
    assert engine.plan_count(-1) == 2


def test_a_thousand_problems_leave_no_more_than_the_bound():
    engine, library, _ = make_engine()
    for step in range(1_000):
        problem = problems.forward(8 + 8 * step, 16, 16, BF16)
        a, b, out, _ = operands(problem)
        engine.matmul(problem, step % 3, engine.compress(a), b, out)
    assert engine.plan_count(-1) == Engine.MAX_PLANS == 256
    assert len(library.live) == 1 + 6 * 256  # a handle, and six objects a plan
    engine.close()
    assert library.live == {}


def test_a_cached_plan_makes_nothing_new():
    engine, library, _ = make_engine()
    a, b, out, _ = operands(FORWARD)
    packed = engine.compress(a)
    engine.matmul(FORWARD, 0, packed, b, out)
    made = library.made
    for _ in range(10):
        engine.matmul(problems.forward(24, 32, 48, BF16), 0, packed, b, out)
    assert library.made == made


def test_release_frees_the_plans_of_one_problem_but_the_kept_one():
    engine, _, _ = make_engine()
    for algorithm in range(4):
        run(engine, FORWARD, algorithm)
    run(engine, PRODUCTS["grad_input"])
    engine.release(FORWARD, -1, keep=2)
    assert engine.plan_count(-1) == 2
    engine.release(FORWARD, -1)
    assert engine.plan_count(-1) == 1


def test_each_thread_has_its_own_handle_and_takes_it_along_when_it_ends():
    engine, library, _ = make_engine()
    run(engine, FORWARD)
    mine = {number for number, (kind, _) in library.live.items() if kind == "handle"}
    seen: list[int] = []
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for problem in PRODUCTS.values():
                run(engine, problem)
            seen.append(sum(kind == "handle" for kind, _ in library.live.values()))
        except BaseException as error:
            failures.append(error)

    for _ in range(3):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    gc.collect()
    assert not failures
    assert seen == [2, 2, 2]
    assert {number for number, (kind, _) in library.live.items() if kind == "handle"} == mine
    assert len(library.live) == 1 + 6


def test_many_threads_at_once_get_right_results():
    engine, library, _ = make_engine()
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(20):
                for problem in PRODUCTS.values():
                    run(engine, problem, algorithm=1)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gc.collect()
    assert not failures
    assert library.live == {}


def test_an_engine_that_is_dropped_frees_everything_and_close_can_be_repeated():
    engine, library, _ = make_engine()
    run(engine, FORWARD)
    engine.close()
    engine.close()
    assert library.live == {}
    run(engine, FORWARD)
    del engine
    gc.collect()
    assert library.live == {}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_frees_nothing_of_its_parent():
    engine, library, _ = make_engine()
    run(engine, FORWARD)
    child = os.fork()
    if child == 0:
        library.log.clear()
        engine.close()
        os._exit(0 if library.log == [] else 1)
    assert os.waitpid(child, 0)[1] == 0
    run(engine, FORWARD)


def test_the_interpreter_ends_quietly_with_handles_open_in_threads():
    code = """
import threading, time, torch
from semisparse.gemm import engine as module, problem
from tests.gemm import simulated

library, runtime = simulated.SimulatedLibrary(), simulated.SimulatedRuntime()
module.Engine.__init__.__defaults__ = (lambda: library, runtime)
engine = module.engine()

def use():
    made = problem.forward(24, 32, 48, torch.bfloat16)
    a, b, out, _ = simulated.operands(made)
    engine.matmul(made, 0, engine.compress(a), b, out)

def linger():
    use()
    time.sleep(60)

use()
thread = threading.Thread(target=linger, daemon=True)
thread.start()
while len(library.products) < 2:
    time.sleep(0.01)
import atexit
atexit._run_exitfuncs()
print(sorted({kind for kind, _ in library.live.values()}), sum(kind == "handle" for kind, _ in library.live.values()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.endswith(" 1\n")  # this thread's handle was freed, the busy thread's left alone


# ---- compressing


def test_compress_checks_the_pattern_unless_told_not_to():
    engine, _, _ = make_engine()
    dense = torch.ones(16, 16, dtype=BF16)
    with pytest.raises(ShapeError, match="more than 2 of 4"):
        engine.compress(dense)
    assert engine.compress(two_of_four(16, 16, BF16)).dtype == torch.uint8


@pytest.mark.parametrize(
    ("dense", "error"),
    [
        (torch.zeros(16, 16), TensorError),
        (torch.zeros(16, 24, dtype=BF16), ShapeError),
        (torch.zeros(0, 16, dtype=BF16), ShapeError),
        (torch.zeros(2, 16, 16, dtype=BF16), ShapeError),
        (torch.zeros(16, 32, dtype=BF16)[:, ::2], TensorError),
        (torch.zeros(16 * 16 + 1, dtype=BF16)[1:].view(16, 16), TensorError),
    ],
)
def test_compress_refuses_what_the_library_would_misread(dense, error):
    engine, library, _ = make_engine()
    with pytest.raises(error, match="dense"):
        engine.compress(dense)
    assert library.made == 0


def test_packed_bytes_and_algorithms_leave_nothing_behind():
    engine, library, _ = make_engine()
    assert engine.packed_bytes(32, 48, BF16, -1) == engine.compress(two_of_four(32, 48, BF16)).numel()
    assert engine.algorithms(FORWARD, -1) == range(6)
    assert {kind for kind, _ in library.live.values()} == {"handle"}


# ---- availability


def unavailable(engine: Engine) -> str:
    """The reason, checked to be the one that using the engine anyway gives."""
    verdict = engine.available()
    assert not verdict.ok
    assert engine.available() is verdict
    with pytest.raises(EngineError) as error:
        engine.compress(two_of_four(16, 16, BF16))
    assert verdict.reason in str(error.value)
    assert "engine='dense'" in str(error.value)
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
    subprocess.run([sys.executable, "-c", code], check=True)


def test_only_one_file_imports_the_bindings():
    import semisparse

    root = os.path.dirname(semisparse.__file__)
    naming = []
    for folder, _, files in os.walk(root):
        for name in files:
            if name.endswith(".py"):
                with open(os.path.join(folder, name), encoding="utf-8") as file:
                    if "import nvmath" in (text := file.read()) or "from nvmath" in text:
                        naming.append(name)
    assert naming == ["cusparselt.py"]


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
