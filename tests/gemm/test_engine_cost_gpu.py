"""What the engine and the tuner cost on a real GPU: host and device memory, time of a call, time of tuning."""

import gc
import os
import statistics
import time
from dataclasses import replace

import pytest
import torch

from benchmarks import host
from semisparse import native
from semisparse.gemm import problem as problems
from semisparse.gemm.autotune.autotuner import Autotuner
from semisparse.gemm.autotune.candidates import MEMORY, integers
from semisparse.gemm.autotune.selection import SECONDS
from semisparse.gemm.engine import Engine
from semisparse.gemm.operands import Operands
from tests.gemm.products import FORWARD, PRODUCTS, real, whole

pytestmark = pytest.mark.gpu

BF16 = torch.bfloat16

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
                engine.matmul(shape, 0, Operands(packed, wide[: shape.columns], out))

    rounds(10)
    torch.cuda.synchronize()
    gc.collect()
    host, device = resident_bytes(), torch.cuda.memory_allocated()
    free = torch.cuda.mem_get_info()[0]
    rounds(50)
    torch.cuda.synchronize()
    gc.collect()
    assert engine.plan_count(0) == 16
    assert torch.cuda.memory_allocated() == device
    assert free - torch.cuda.mem_get_info()[0] <= 256 * 2**10
    assert resident_bytes() - host <= 8 * 2**20
    # Last, because the first comparison loads its kernels, which takes host memory.
    for shape, out in zip(shapes, outs, strict=True):
        assert torch.equal(out, right[: shape.columns])
    engine.close()


@pytest.mark.parametrize(("variant", "bound"), [(host.EACH, 2.5), (host.PER_STEP, 2.0)])
def test_host_time_of_an_eager_step_through_small_layers_is_bounded_by_linears(stack, variant, bound):
    """Relative, because both depend on the host: nn.Linear took 14 us on one machine and 29 us on another."""
    ratio = host.relative(stack[host.BOTH, variant], stack[host.BOTH, host.DENSE])
    assert ratio.median <= bound, f"{ratio}; {native.status()}"


@pytest.fixture(scope="module")
def stack():
    """Host times of the stack of small layers, eager; variants in turn, so that a slow minute of the host meets all."""
    calls = host.variants(compiled=False)
    return host.rounds_of(calls, rounds=host.ROUNDS, iterations=host.ITERATIONS)


def test_a_new_token_count_costs_at_most_what_50_linears_do(engine):
    """In time of the host; a millisecond where a linear takes 20 us."""
    a, _, _, bias = whole(FORWARD)
    packed = engine.compress(a)
    b = torch.zeros(4096, FORWARD.reduction, dtype=BF16, device="cuda")
    out = torch.empty(4096, FORWARD.rows, dtype=BF16, device="cuda")
    times, linears, small = [], [], torch.zeros(64, 64, dtype=BF16, device="cuda")
    for columns in range(8, 8 + 8 * 64, 8):
        problem = replace(FORWARD, columns=columns)
        begin = time.perf_counter()
        engine.matmul(problem, 0, Operands(packed, b[:columns], out[:columns], bias))
        times.append(time.perf_counter() - begin)
        engine.release(problem, 0)
        begin = time.perf_counter()
        for _ in range(5):
            torch.nn.functional.linear(small, small)
        linears.append((time.perf_counter() - begin) / 5)
    torch.cuda.synchronize()
    assert statistics.median(times) <= 50 * statistics.median(linears)


def test_a_workspace_of_zero_allocates_nothing(engine):
    problem = problems.grad_input(64, 64, 64, BF16)
    a, b, out, _ = whole(problem)
    packed = engine.compress(a)
    engine.matmul(problem, 0, Operands(packed, b, out))
    (plan,) = [plan for key, plan in engine._local.handles[0].plans.items() if key == (problem, 0)]
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    engine.matmul(problem, 0, Operands(packed, b, out))
    assert torch.cuda.memory_stats()["allocation.all.allocated"] - before == bool(plan.workspace)


# ---- tuning


LARGE = {
    "forward with bias": (13008, 4096, 1024),
    "grad_input": (16384, 11008, 4096),
    "activation_forward": (13008, 4096, 1024),
    "activation_weight": (13008, 4096, 1024),
    "sampled_weight": (16384, 2048, 8192),
}


@pytest.mark.parametrize("name", LARGE)
def test_tuning_keeps_its_limits_and_leaves_nothing_behind(engine, name):
    problem = PRODUCTS[name](*LARGE[name], BF16)
    a, b, out, bias = real(problem)
    packed = engine.compress(a)
    del a
    made = Autotuner(engine, None)
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
