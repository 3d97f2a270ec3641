"""The engine on a real GPU with the real library: results, streams, threads, devices, CUDA graphs."""

import threading

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.timing import kernels_of
from semisparse.errors import EngineError, ShapeError, TensorError
from semisparse.gemm import dense
from semisparse.gemm import problem as problems
from semisparse.gemm.autotune.autotuner import Autotuner
from semisparse.gemm.autotune.candidates import Candidates
from semisparse.gemm.autotune.selection import NOT_REACHED
from semisparse.gemm.engine import Engine
from semisparse.gemm.operands import Operands
from semisparse.gemm.problem import Problem
from tests.gemm.products import FORWARD, PRODUCTS, product, real, whole

pytestmark = pytest.mark.gpu

BF16, FP16 = torch.bfloat16, torch.float16
# Tokens, N, K: the smallest, no multiples of 64, long and short in each direction, and the shapes of a ViT-L MLP.
SIZES = [
    (1, 16, 16), (13, 48, 80), (200, 80, 48), (1000, 16, 2048), (24, 2048, 16), (1024, 1024, 4096), (4104, 4096, 1024),
    (13008, 1024, 4096), (16, 11008, 4096), (7, 14336, 4096),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("name", PRODUCTS)
def test_integers_are_exact_and_real_numbers_as_good_as_dense(engine, name, sizes, dtype):
    problem = PRODUCTS[name](*sizes, dtype)
    a, b, out, bias = whole(problem)
    engine.matmul(problem, 0, Operands(engine.compress(a), b, out, bias))
    assert torch.equal(out, product(problem, a, b, bias, torch.float32).to(dtype))
    a, b, out, bias = real(problem)
    engine.matmul(problem, 0, Operands(engine.compress(a), b, out, bias))
    peer = torch.empty_like(out)
    dense.product(problem, a, Operands(a, b, peer, bias))
    truth = product(problem, a, b, bias, torch.float64)
    # One rounding to the 16-bit dtype at the largest value is what any correct result may be off by.
    rounding = torch.finfo(dtype).eps * truth.abs().max() / 2
    assert (out - truth).abs().max() <= max(2 * (peer - truth).abs().max(), rounding)
    engine.release(problem, out.get_device())


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_every_algorithm_is_bit_stable_or_found_out(engine, sizes):
    """20 repeats of each on integers are right bit for bit; one that is not must be one that Candidates refuse."""
    problem = problems.forward(*sizes, BF16, bias=True)
    a, b, out, bias = whole(problem)
    packed = engine.compress(a)
    right = product(problem, a, b, bias, torch.float32).to(BF16)
    wrong = set()
    for algorithm in engine.algorithms(problem, 0):
        for _ in range(20):
            out.fill_(float("nan"))
            engine.matmul(problem, algorithm, Operands(packed, b, out, bias))
            if not torch.equal(out, right):
                wrong.add(algorithm)
    candidates = Candidates(engine, problem, Operands(packed, torch.randn_like(b), out, bias))
    refused = {algorithm for algorithm in engine.algorithms(problem, 0) if candidates.fault(algorithm)}
    candidates.close(keep=None)
    assert wrong <= refused
    assert len(refused) < len(engine.algorithms(problem, 0))


def test_algorithm_ids_end_where_the_library_says(engine):
    a, b, out, bias = whole(FORWARD)
    packed, ids = engine.compress(a), engine.algorithms(FORWARD, 0)
    assert len(ids) >= 1
    with pytest.raises(EngineError, match=r"algorithm=\d+ is not offered"):
        engine.matmul(FORWARD, ids.stop, Operands(packed, b, out, bias))


def test_each_call_adds_its_own_bias(engine):
    a, b, out, _ = whole(FORWARD)
    packed = engine.compress(a)
    biases = [torch.full((FORWARD.rows,), float(step), dtype=BF16, device="cuda") for step in range(4)]
    outs = [torch.empty_like(out) for _ in biases]
    for bias, into in zip(biases, outs, strict=True):
        engine.matmul(FORWARD, 0, Operands(packed, b, into, bias))
    for bias, into in zip(biases, outs, strict=True):
        assert torch.equal(into, product(FORWARD, a, b, bias, torch.float32).to(BF16))


def test_compressing_loses_nothing(engine):
    for rows, columns in ((16, 16), (48, 80), (80, 48), (128, 4096), (1040, 272)):
        problem = Problem(rows, columns, columns, BF16, "column", "row")
        a = whole(problem)[0]
        out = torch.empty(rows, columns, dtype=BF16, device="cuda")
        packed = engine.compress(a)
        assert packed.numel() == engine.packed_bytes(rows, columns, BF16, 0)
        engine.matmul(problem, 0, Operands(packed, torch.eye(columns, dtype=BF16, device="cuda"), out))
        assert torch.equal(out, a)


def test_compress_refuses_three_of_four(engine):
    matrix = torch.zeros(64, 64, dtype=BF16, device="cuda")
    matrix[40, 8:11] = 1
    with pytest.raises(ShapeError, match="more than 2 of 4"):
        engine.compress(matrix)


@pytest.mark.parametrize("missing", [1, 64])
def test_a_packed_buffer_that_is_too_short_or_elsewhere_is_an_error(engine, missing):
    a, b, out, bias = whole(FORWARD)
    packed = engine.compress(a)
    with pytest.raises(ShapeError, match="packed has shape"):
        engine.matmul(FORWARD, 0, Operands(packed[:-missing].clone(), b, out, bias))
    with pytest.raises(TensorError, match="packed is on cpu"):
        engine.matmul(FORWARD, 0, Operands(packed.cpu(), b, out, bias))


@pytest.mark.parametrize("more", [1, 4096])
def test_bytes_behind_a_packed_matrix_are_not_read(engine, more):
    a, b, out, bias = whole(FORWARD)
    packed = torch.cat([engine.compress(a), torch.full((more,), 255, dtype=torch.uint8, device="cuda")])
    engine.matmul(FORWARD, 0, Operands(packed, b, out, bias))
    assert torch.equal(out, product(FORWARD, a, b, bias, torch.float32).to(BF16))


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
                engine.matmul(FORWARD, ids[step % len(ids)], Operands(packed, b, out, bias))
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
        engine.matmul(FORWARD, 0, Operands(packed, late, out, bias))
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
                    engine.matmul(FORWARD, algorithm, Operands(packed, b, out, bias))
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
        engine.matmul(FORWARD, 0, Operands(engine.compress(a), b, out, bias))
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
            engine.matmul(FORWARD, algorithm, Operands(packed, b, out, bias))
        graph = captured(lambda: engine.matmul(FORWARD, algorithm, Operands(packed, b, out, bias)))  # noqa: B023
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
    engine.matmul(FORWARD, 0, Operands(packed, b, out, bias))
    graph = captured(lambda: engine.matmul(FORWARD, 0, Operands(packed, b, out, other)))
    out.fill_(float("nan"))
    graph.replay()
    assert torch.equal(out, product(FORWARD, a, b, other, torch.float32).to(BF16))


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")  # the refusal leaves nothing to capture
def test_a_cold_capture_is_refused_by_the_tuner(engine):
    a, b, out, bias = whole(FORWARD)
    packed = engine.compress(a)
    cold = Autotuner(engine, None, shipped=tuple)
    with pytest.raises(EngineError, match="warm-up step"):
        captured(lambda: cold.choose(FORWARD, 0, Operands(packed, b, out, bias)))
    torch.cuda.synchronize()
    assert cold.choose(FORWARD, 0, Operands(packed, b, out, bias)).algorithm is not None


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_plans_that_share_run_the_kernels_of_plans_of_their_own(engine, dtype, bias):
    problem = problems.forward(1000, 512, 1024, dtype, bias=bias)
    a, b, out, one = whole(problem)
    packed, ids = engine.compress(a), list(engine.algorithms(problem, 0))

    def ran(algorithm, more):
        """The kernels of a product, which is right with this bias."""
        given = None if one is None else one + more
        with profile(activities=[ProfilerActivity.CUDA]) as found:
            engine.matmul(problem, algorithm, Operands(packed, b, out, given))
            torch.cuda.synchronize()
        assert torch.equal(out, product(problem, a, b, given, torch.float32).to(dtype))
        return [name for _, _, name in kernels_of(found.events()) if not name.startswith("Mem")]

    own = {}
    for algorithm in ids:
        own[algorithm] = ran(algorithm, 0)
        engine.release(problem, 0)
    assert len(set(map(tuple, own.values()))) > 1  # so that another plan would be seen
    end = engine.share(problem, 0, one)
    for more, algorithms in enumerate((ids, ids[::-1], ids[::3])):
        for algorithm in algorithms:
            assert ran(algorithm, more) == own[algorithm]
    end()
    engine.release(problem, 0)


def test_fp16_is_tuned_with_all_algorithms():
    """In seconds in which plans of their own would take four times as long, also beside tests that use the GPU."""
    problem = problems.forward(4096, 4096, 4096, FP16)
    a, b, out, _ = whole(problem)
    engine = Engine()
    tuner, packed = Autotuner(engine, None, shipped=tuple, seconds=6), engine.compress(a)
    choice = tuner.choose(problem, 0, Operands(packed, b, out), None)
    assert len(engine.algorithms(problem, 0)) > 30
    engine.close()
    assert not [why for _, why in choice.rejected if why == NOT_REACHED]
