"""The engine and the tuner on a real GPU with the real library."""

import gc
import os
import statistics
import threading
import time
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from semisparse.errors import EngineError, ShapeError, TensorError
from semisparse.gemm import dense
from semisparse.gemm import problem as problems
from semisparse.gemm.engine import Engine
from semisparse.gemm.problem import Problem
from semisparse.gemm.race import SECONDS
from semisparse.gemm.trial import MEMORY, Operands, Trial, integers, keep_two_of_four
from semisparse.gemm.tuner import Tuner

pytestmark = pytest.mark.gpu

BF16, FP16 = torch.bfloat16, torch.float16
PRODUCTS = {
    "forward": lambda tokens, n, k, dtype: problems.forward(tokens, n, k, dtype),
    "forward with bias": lambda tokens, n, k, dtype: problems.forward(tokens, n, k, dtype, bias=True),
    "grad_input": problems.grad_input,
    "activation_forward": problems.activation_forward,
    "activation_weight": problems.activation_weight,
}
# Tokens, N, K: the smallest, no multiples of 64, long and short in each direction, and the shapes of a ViT-L MLP.
SIZES = [
    (1, 16, 16), (13, 48, 80), (200, 80, 48), (1000, 16, 2048), (24, 2048, 16), (1024, 1024, 4096), (4104, 4096, 1024),
    (13008, 1024, 4096), (16, 11008, 4096), (7, 14336, 4096),
]  # fmt: skip
FORWARD = problems.forward(1000, 1024, 512, BF16, bias=True)


@pytest.fixture(scope="module")
def engine():
    made = Engine()
    verdict = made.available("cuda")
    assert verdict.ok, verdict.reason
    yield made
    made.close()


def whole(problem: Problem, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """a (full matrix), b, out (NaN) and bias on the GPU: small integers."""
    generator = torch.Generator("cuda").manual_seed(seed)
    device = torch.device("cuda")
    a = integers((problem.rows, problem.reduction), problem.dtype, device, generator)
    keep_two_of_four(a, generator, 2**22)
    b = integers(problem.b_shape, problem.dtype, device, generator)
    bias = integers((problem.rows,), problem.dtype, device, generator) if problem.bias else None
    return a, b, torch.full(problem.d_shape, float("nan"), dtype=problem.dtype, device=device), bias


def real(problem: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The same with normal numbers."""
    a, b, out, bias = whole(problem)
    a = torch.where(a != 0, torch.randn_like(a), 0)
    return a, torch.randn_like(b), out, None if bias is None else torch.randn_like(bias)


def product(problem: Problem, a: Tensor, b: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The product computed in dtype, stored as D is; exact for integers in fp32."""
    result = a.to(dtype) @ (b if problem.b_order == "row" else b.mT).to(dtype)
    if bias is not None:
        result = result + bias.to(dtype)[:, None]
    return result if problem.d_order == "row" else result.mT


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("name", PRODUCTS)
def test_integers_are_exact_and_real_numbers_as_good_as_dense(engine, name, sizes, dtype):
    problem = PRODUCTS[name](*sizes, dtype)
    a, b, out, bias = whole(problem)
    engine.matmul(problem, 0, engine.compress(a), b, out, bias)
    assert torch.equal(out, product(problem, a, b, bias, torch.float32).to(dtype))
    a, b, out, bias = real(problem)
    engine.matmul(problem, 0, engine.compress(a), b, out, bias)
    peer = torch.empty_like(out)
    dense.product(problem, a, b, peer, bias)
    truth = product(problem, a, b, bias, torch.float64)
    # One rounding to the 16-bit dtype at the largest value is what any correct result may be off by.
    rounding = torch.finfo(dtype).eps * truth.abs().max() / 2
    assert (out - truth).abs().max() <= max(2 * (peer - truth).abs().max(), rounding)
    engine.release(problem, out.get_device())


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_every_algorithm_is_bit_stable_or_found_out(engine, sizes):
    """20 repeats of each on integers are right bit for bit; one that is not must be one that a Trial refuses."""
    problem = problems.forward(*sizes, BF16, bias=True)
    a, b, out, bias = whole(problem)
    packed = engine.compress(a)
    right = product(problem, a, b, bias, torch.float32).to(BF16)
    wrong = set()
    for algorithm in engine.algorithms(problem, 0):
        for _ in range(20):
            out.fill_(float("nan"))
            engine.matmul(problem, algorithm, packed, b, out, bias)
            if not torch.equal(out, right):
                wrong.add(algorithm)
    trial = Trial(engine, problem, Operands(packed, torch.randn_like(b), out, bias))
    refused = {algorithm for algorithm in engine.algorithms(problem, 0) if trial.fault(algorithm)}
    trial.close(keep=None)
    assert wrong <= refused
    assert len(refused) < len(engine.algorithms(problem, 0))


def test_algorithm_ids_end_where_the_library_says(engine):
    a, b, out, bias = whole(FORWARD)
    packed, ids = engine.compress(a), engine.algorithms(FORWARD, 0)
    assert len(ids) >= 1
    with pytest.raises(EngineError, match="no plan with algorithm"):
        engine.matmul(FORWARD, ids.stop, packed, b, out, bias)


def test_each_call_adds_its_own_bias(engine):
    a, b, out, _ = whole(FORWARD)
    packed = engine.compress(a)
    biases = [torch.full((FORWARD.rows,), float(step), dtype=BF16, device="cuda") for step in range(4)]
    outs = [torch.empty_like(out) for _ in biases]
    for bias, into in zip(biases, outs, strict=True):
        engine.matmul(FORWARD, 0, packed, b, into, bias)
    for bias, into in zip(biases, outs, strict=True):
        assert torch.equal(into, product(FORWARD, a, b, bias, torch.float32).to(BF16))


def test_compressing_loses_nothing(engine):
    for rows, columns in ((16, 16), (48, 80), (80, 48), (128, 4096), (1040, 272)):
        problem = Problem(rows, columns, columns, BF16, "column", "row")
        a = whole(problem)[0]
        out = torch.empty(rows, columns, dtype=BF16, device="cuda")
        packed = engine.compress(a)
        assert packed.numel() == engine.packed_bytes(rows, columns, BF16, 0)
        engine.matmul(problem, 0, packed, torch.eye(columns, dtype=BF16, device="cuda"), out)
        assert torch.equal(out, a)


def test_compress_refuses_three_of_four(engine):
    matrix = torch.zeros(64, 64, dtype=BF16, device="cuda")
    matrix[40, 8:11] = 1
    with pytest.raises(ShapeError, match="more than 2 of 4"):
        engine.compress(matrix)


@pytest.mark.parametrize("change", [-64, -1, 1, 64])
def test_a_packed_buffer_of_the_wrong_size_is_an_error(engine, change):
    a, b, out, bias = whole(FORWARD)
    packed = engine.compress(a)
    wrong = torch.zeros(packed.numel() + change, dtype=torch.uint8, device="cuda")
    with pytest.raises(ShapeError, match="packed has shape"):
        engine.matmul(FORWARD, 0, wrong, b, out, bias)
    with pytest.raises(TensorError, match="packed is on cpu"):
        engine.matmul(FORWARD, 0, packed.cpu(), b, out, bias)


# ---- streams, threads, devices


def test_two_streams_under_a_busy_allocator(engine):
    a, b, _, bias = whole(FORWARD)
    packed = engine.compress(a)
    right = product(FORWARD, a, b, bias, torch.float32).to(BF16)
    ids = engine.algorithms(FORWARD, 0)
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    for step in range(250):
        outs = []
        for stream in streams:
            with torch.cuda.stream(stream):
                noise = torch.full((1 + step % 7, 1 << 16), float("nan"), device="cuda")
                out = torch.full(FORWARD.d_shape, float("nan"), dtype=BF16, device="cuda")
                engine.matmul(FORWARD, ids[step % len(ids)], packed, b, out, bias)
                del noise
                outs.append(out)
        for stream, out in zip(streams, outs, strict=True):
            stream.synchronize()
            assert torch.equal(out, right)


def test_the_product_waits_for_its_own_stream(engine):
    a, b, out, bias = whole(FORWARD)
    packed = engine.compress(a)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        late = torch.empty_like(b)
        torch.cuda._sleep(50_000_000)
        late.copy_(b)
        engine.matmul(FORWARD, 0, packed, late, out, bias)
    stream.synchronize()
    assert torch.equal(out, product(FORWARD, a, b, bias, torch.float32).to(BF16))


def test_threads_have_their_own_handles(engine):
    a, b, _, bias = whole(FORWARD)
    packed = engine.compress(a)
    right = product(FORWARD, a, b, bias, torch.float32).to(BF16)
    torch.cuda.synchronize()
    failures = []

    def work():
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for algorithm in list(engine.algorithms(FORWARD, 0)) * 5:
                    out = torch.full(FORWARD.d_shape, float("nan"), dtype=BF16, device="cuda")
                    engine.matmul(FORWARD, algorithm, packed, b, out, bias)
                    torch.cuda.current_stream().synchronize()
                    assert torch.equal(out, right)
        except BaseException as error:
            failures.append(repr(error))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_another_device_than_the_current_one(engine):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    a, b, out, bias = (tensor.to("cuda:1") for tensor in whole(FORWARD))
    with torch.cuda.device(0):
        engine.matmul(FORWARD, 0, engine.compress(a), b, out, bias)
        assert torch.cuda.current_device() == 0
    assert torch.equal(out, product(FORWARD, a, b, bias, torch.float32).to(BF16))


# ---- CUDA graphs


def captured(call) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        call()
    return graph


@pytest.mark.parametrize("warm", [True, False], ids=["plan made before", "plan made while capturing"])
def test_every_algorithm_can_be_captured_and_replayed_with_new_inputs(warm):
    engine = Engine()
    assert engine.available("cuda").ok
    a, b, out, bias = whole(FORWARD)
    packed = engine.compress(a)
    for algorithm in engine.algorithms(FORWARD, 0):
        if warm:
            engine.matmul(FORWARD, algorithm, packed, b, out, bias)
        graph = captured(lambda: engine.matmul(FORWARD, algorithm, packed, b, out, bias))  # noqa: B023
        engine.release(FORWARD, 0)  # a graph outlives the plan it was captured from
        for _ in range(5):
            b.random_(-2, 3)
            bias.random_(-2, 3)
            out.fill_(float("nan"))
            graph.replay()
            assert torch.equal(out, product(FORWARD, a, b, bias, torch.float32).to(BF16))
    engine.close()


def test_a_captured_call_with_another_bias_is_right(engine):
    a, b, out, bias = whole(FORWARD)
    packed, other = engine.compress(a), bias + 1
    engine.matmul(FORWARD, 0, packed, b, out, bias)
    graph = captured(lambda: engine.matmul(FORWARD, 0, packed, b, out, other))
    out.fill_(float("nan"))
    graph.replay()
    assert torch.equal(out, product(FORWARD, a, b, other, torch.float32).to(BF16))


def test_a_cold_capture_is_refused_by_the_tuner(engine):
    a, b, out, bias = whole(FORWARD)
    packed = engine.compress(a)
    cold = Tuner(engine, None, rows=lambda: ())
    with pytest.raises(EngineError, match="warm-up step"):
        captured(lambda: cold.choose(FORWARD, 0, Operands(packed, b, out, bias)))
    torch.cuda.synchronize()
    assert cold.choose(FORWARD, 0, Operands(packed, b, out, bias)).algorithm is not None


# ---- memory and time


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_plans_that_come_and_go_leak_neither_host_nor_device_memory():
    """More problems than plans are kept, freed while their kernels may still run; no wait in between."""
    engine = Engine()
    engine.MAX_PLANS = 16
    weight = whole(problems.grad_input(8, 512, 512, BF16))[0]
    packed = engine.compress(weight)
    shapes = [problems.grad_input(8 * step, 512, 512, BF16) for step in range(1, 65)]
    wide = integers((512, 512), BF16, torch.device("cuda"), torch.Generator("cuda").manual_seed(1))
    right = (wide.float() @ weight.float().mT).to(BF16)
    outs = [torch.empty(shape.d_shape, dtype=BF16, device="cuda") for shape in shapes]

    def rounds(count: int) -> None:
        for _ in range(count):
            for shape, out in zip(shapes, outs, strict=True):
                engine.matmul(shape, 0, packed, wide[: shape.columns], out)

    rounds(10)
    torch.cuda.synchronize()
    gc.collect()
    host, device = resident_bytes(), torch.cuda.memory_allocated()
    free = torch.cuda.mem_get_info()[0]
    rounds(50)
    torch.cuda.synchronize()
    gc.collect()
    for shape, out in zip(shapes, outs, strict=True):
        assert torch.equal(out, right[: shape.columns])
    assert engine.plan_count(0) == 16
    assert torch.cuda.memory_allocated() == device
    assert free - torch.cuda.mem_get_info()[0] <= 256 * 2**10
    assert resident_bytes() - host <= 8 * 2**20
    engine.close()


def median_us(call, batches: int = 15, size: int = 200) -> float:
    """Median host time of a call over batches; the device is drained in between, so that it never pushes back."""
    times = []
    for _ in range(batches):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(size):
            call()
        times.append((time.perf_counter() - begin) / size * 1e6)
    torch.cuda.synchronize()
    return statistics.median(times)


def test_host_time_of_a_cached_call_is_at_most_25_us(engine):
    problem = problems.forward(64, 64, 64, BF16, bias=True)
    a, b, out, bias = whole(problem)
    packed = engine.compress(a)
    for algorithm in (0, engine.algorithms(problem, 0)[-1]):
        engine.matmul(problem, algorithm, packed, b, out, bias)
        measured = median_us(
            lambda: engine.matmul(problems.forward(64, 64, 64, BF16, True), algorithm, packed, b, out, bias)  # noqa: B023
        )
        assert measured <= 25.0, f"{measured:.1f} us"


def test_a_new_token_count_costs_at_most_a_millisecond(engine):
    a, _, _, bias = whole(FORWARD)
    packed = engine.compress(a)
    b = torch.zeros(4096, FORWARD.reduction, dtype=BF16, device="cuda")
    out = torch.empty(4096, FORWARD.rows, dtype=BF16, device="cuda")
    times = []
    for columns in range(8, 8 + 8 * 64, 8):
        problem = replace(FORWARD, columns=columns)
        begin = time.perf_counter()
        engine.matmul(problem, 0, packed, b[:columns], out[:columns], bias)
        times.append(time.perf_counter() - begin)
        engine.release(problem, 0)
    torch.cuda.synchronize()
    assert statistics.median(times) <= 1e-3


def test_a_workspace_of_zero_allocates_nothing(engine):
    problem = problems.grad_input(64, 64, 64, BF16)
    a, b, out, _ = whole(problem)
    packed = engine.compress(a)
    engine.matmul(problem, 0, packed, b, out)
    (plan,) = [plan for key, plan in engine._local.handles[0].plans.items() if key == (problem, 0)]
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    engine.matmul(problem, 0, packed, b, out)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] - before == bool(plan.workspace)


# ---- tuning


LARGE = {
    "forward with bias": (13008, 4096, 1024),
    "grad_input": (16384, 11008, 4096),
    "activation_forward": (13008, 4096, 1024),
    "activation_weight": (13008, 4096, 1024),
}


@pytest.mark.parametrize("name", LARGE)
def test_tuning_keeps_its_limits_and_leaves_nothing_behind(engine, name):
    problem = PRODUCTS[name](*LARGE[name], BF16)
    a, b, out, bias = real(problem)
    packed = engine.compress(a)
    del a
    made = Tuner(engine, None)
    made.key(problem, 0)  # loads what only the first call of a process pays for
    torch.cuda.synchronize()
    gc.collect()
    state, allocated = torch.cuda.get_rng_state(), torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    choice = made.choose(problem, 0, Operands(packed, b, out, bias))
    spent = time.perf_counter() - begin
    assert torch.cuda.max_memory_allocated() - allocated <= MEMORY
    assert torch.cuda.memory_allocated() == allocated
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert spent <= 2 * SECONDS  # what was begun within the limit is finished, and kernels are loaded on first use
    assert choice.sparse_algorithm is not None
    assert engine.plan_count(0) >= 1
