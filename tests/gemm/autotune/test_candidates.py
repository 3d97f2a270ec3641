"""Checking of candidates, on the simulated library with algorithms that go wrong in known ways."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from semisparse.errors import EngineError
from semisparse.gemm import problem as problems
from semisparse.gemm.autotune import candidates as module
from semisparse.gemm.autotune.candidates import Candidates, integers, keep_two_of_four, make_sample, within
from semisparse.gemm.operands import Operands
from tests.gemm.simulated import cuSPARSELtError, exact, make_engine, operands, unpack

BF16 = torch.bfloat16
PRODUCTS = [
    problems.forward(72, 64, 48, BF16, bias=True),
    problems.grad_input(72, 64, 48, torch.float16),
    problems.activation_forward(72, 64, 48, BF16),
    problems.activation_weight(72, 64, 48, torch.float16),
    problems.sampled_weight(72, 64, 48, BF16),
    problems.fp8_forward(72, 64, 96, BF16),
    problems.fp8_grad_input(72, 64, 96, torch.float32),
]


def make_candidates(problem, library=None, **options):
    engine, library, _ = make_engine(library)
    a, _, out, bias = operands(problem)
    noise = torch.randn(problem.b_shape).to(problem.dtype)  # sums whose order shows
    return Candidates(engine, problem, Operands(engine.compress(a), noise, out, bias), **options), library, engine


@pytest.mark.parametrize("problem", PRODUCTS, ids=str)
def test_a_right_algorithm_has_no_fault(problem):
    candidates, _, _ = make_candidates(problem)
    assert [candidates.fault(algorithm) for algorithm in range(3)] == [None] * 3


def one_element(out):
    out[out.shape[0] - 1, out.shape[1] // 2] += 1


def unwritten(out):
    out[:, -1] = float("nan")


def swapped_rows(out):
    out[[0, out.shape[0] - 1]] = out[[out.shape[0] - 1, 0]]


@pytest.mark.parametrize("problem", PRODUCTS, ids=str)
@pytest.mark.parametrize("fault", [one_element, unwritten, swapped_rows, torch.Tensor.zero_])
def test_a_wrong_result_is_found(problem, fault):
    candidates, library, _ = make_candidates(problem)
    library.faults[2] = fault
    assert candidates.fault(2) == "wrong: differs from the dense product in run 1"
    assert candidates.fault(1) is None


def test_an_algorithm_that_is_wrong_now_and_then_is_found():
    candidates, library, _ = make_candidates(PRODUCTS[1])
    runs = itertools.count()
    library.faults[2] = lambda out: one_element(out) if next(runs) == 2 else None
    assert candidates.fault(2) == "wrong: differs from the dense product in run 3"


def test_an_algorithm_that_writes_nothing_now_and_then_is_not_judged_by_what_it_wrote_before():
    candidates, library, _ = make_candidates(PRODUCTS[1])
    multiply, runs = library.matmul, itertools.count()
    library.matmul = lambda *arguments: multiply(*arguments) if next(runs) != 1 else None
    assert candidates.fault(2) == "wrong: differs from the dense product in run 2"


@pytest.mark.parametrize("tile", range(8))
def test_a_wrong_tile_of_128_rows_is_found_wherever_it_lies(tile):
    candidates, library, _ = make_candidates(problems.grad_input(16, 16, 1024, BF16))
    library.faults[2] = lambda out: out[128 * tile : 128 * (tile + 1)].zero_()
    assert candidates.fault(2) == "wrong: differs from the dense product in run 1"


def test_an_algorithm_that_sums_in_another_order_each_time_is_found():
    """Right on integers, where every order gives the same sum; other last bits on real numbers."""
    candidates, library, _ = make_candidates(PRODUCTS[1])
    runs = itertools.count()

    def jitter(out):
        if not torch.equal(out, out.round()):
            out[0] *= 1 + 0.01 * next(runs)

    library.faults[2] = jitter
    assert candidates.fault(2) == "wrong: other bits in run 2"


def test_equal_nan_results_count_as_equal():
    candidates, _, _ = make_candidates(PRODUCTS[1])
    candidates._operands.b[0, 0] = float("nan")
    assert candidates.fault(0) is None


@pytest.mark.parametrize("run", [1, 2])
def test_an_algorithm_that_ignores_the_bias_of_the_call_is_found(run):
    """The bias altogether, or one that is set when the plan is built already, though another product heeds it."""
    candidates, library, _ = make_candidates(PRODUCTS[0])
    heed = library.matmul_desc_set_attribute

    def set_attribute(handle, matmul, *attribute):
        bf16 = library._get("matrix", library._get("matmul", matmul)["matrices"][0])[3] == 14
        planned = any(kind == "plan" and content["matmul"] == matmul for kind, content in library.live.values())
        if not bf16 or (run == 2 and not planned):
            heed(handle, matmul, *attribute)

    library.matmul_desc_set_attribute = set_attribute
    assert candidates.fault(2) == f"wrong: differs from the dense product in run {run}"


@pytest.mark.parametrize("error", [cuSPARSELtError(10), torch.OutOfMemoryError("out of memory")])
def test_errors_come_through_for_the_race_to_sort_out(error):
    candidates, library, _ = make_candidates(PRODUCTS[1])

    def fail(out):
        raise error

    library.faults[0] = fail
    with pytest.raises(EngineError if isinstance(error, cuSPARSELtError) else torch.OutOfMemoryError):
        candidates.fault(0)


def test_closing_frees_all_plans_but_the_chosen_one():
    for problem, memory in ((PRODUCTS[0], module.MEMORY), (PRODUCTS[0], 16 * 1024)):
        candidates, _, engine = make_candidates(problem, memory=memory)
        for algorithm in range(5):
            candidates.fault(algorithm)
        candidates.close(keep=3)
        assert engine.plan_count(-1) == 1
        candidates.close(keep=None)
        assert engine.plan_count(-1) == 0


def test_the_users_random_numbers_and_settings_are_left_alone():
    before = torch.get_rng_state()
    candidates, _, _ = make_candidates(PRODUCTS[0])
    torch.set_rng_state(before)
    make_sample(candidates._engine, PRODUCTS[0], candidates._operands.out, module.MEMORY)
    candidates.fault(0)
    assert torch.equal(torch.get_rng_state(), before)


def test_autocast_and_a_low_default_dtype_do_not_spoil_the_exact_sums():
    # Long enough for sums that bf16 has to round, so that rounding them before the bias is added shows.
    problem = problems.forward(72, 64, 2**16, BF16, bias=True)
    torch.set_default_dtype(BF16)
    try:
        with torch.autocast("cpu", dtype=BF16):
            engine, _, _ = make_engine()
            out = torch.empty(problem.d_shape, dtype=BF16)
            sample = make_sample(engine, problem, out, module.MEMORY)
    finally:
        torch.set_default_dtype(torch.float32)
    a = unpack(sample.packed, problem.rows, problem.reduction, BF16)
    for bias, expected in zip(sample.biases, sample.expected, strict=True):
        right = exact(problem, a, sample.b, bias)
        assert right.abs().max() > 512
        assert torch.equal(expected, right[:, sample.rows])


@pytest.mark.parametrize("problem", PRODUCTS, ids=str)
def test_the_sample_is_what_it_says(problem):
    engine, _, _ = make_engine()
    sample = make_sample(engine, problem, torch.empty(problem.d_shape, dtype=problem.out_dtype), module.MEMORY)
    a = unpack(sample.packed, problem.rows, problem.reduction, problem.dtype)
    assert ((a.view(-1, 4) != 0).sum(-1) <= 2).all()
    assert set(sample.b.float().unique().tolist()) == {-2.0, -1.0, 0.0, 1.0, 2.0}
    assert sample.rows[0] == 0 and sample.rows[-1] == problem.rows - 1
    for bias, expected in zip(sample.biases, sample.expected, strict=True):
        right = exact(problem, a, sample.b, bias)
        assert torch.equal(expected, right[sample.rows] if problem.d_order == "row" else right[:, sample.rows])
    assert len(sample.biases) == (2 if problem.bias else 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn], ids=str)
def test_all_six_patterns_occur(dtype):
    matrix = torch.ones(64, 64).to(dtype)
    keep_two_of_four(matrix, torch.Generator().manual_seed(0), at_once=128)
    matrix = matrix.float()
    patterns = {tuple(group.tolist()) for group in matrix.view(-1, 4)}
    assert len(patterns) == 6
    assert {sum(pattern) for pattern in patterns} == {2.0}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn], ids=str)
def test_integers_stay_exact_in_every_dtype(dtype):
    made = integers((64, 64), dtype, torch.device("cpu"), torch.Generator().manual_seed(0))
    assert made.dtype is dtype
    assert set(made.float().unique().tolist()) == {-2.0, -1.0, 0.0, 1.0, 2.0}


@pytest.mark.parametrize(
    "problem",
    [
        problems.forward(13008, 4096, 1024, BF16, bias=True),
        problems.grad_input(16384, 11008, 4096, BF16),
        problems.activation_forward(16384, 11008, 4096, BF16),
        problems.activation_weight(44160, 14336, 4096, BF16),
        problems.activation_weight(2**20, 28672, 8192, BF16),
        problems.forward(2**22, 16, 16, BF16),
        problems.fp8_forward(16384, 11008, 4096, BF16),
        problems.fp8_grad_input(2**20, 28672, 8192, torch.float32),
    ],
    ids=str,
)
def test_a_problem_that_is_too_large_is_checked_on_a_part_of_it(problem):
    for memory in (module.MEMORY, module.MEMORY // 4):
        part = within(problem, memory)
        assert part.refusal() is None
        assert part == replace(problem, rows=part.rows, columns=part.columns)
        assert part.rows <= problem.rows and part.columns <= problem.columns
        dense_and_packed = part.rows * part.reduction * 2 * 25 // 16
        assert dense_and_packed <= memory
        assert dense_and_packed * 9 // 25 + part.reduction * part.columns * 2 <= memory
    assert within(problem, 2**60) == problem


@pytest.mark.parametrize(
    "problem",
    [
        problems.forward(4096, 1024, 512, BF16, bias=True),
        problems.activation_forward(4096, 1024, 512, BF16),
        problems.activation_weight(8192, 512, 256, BF16),
        problems.fp8_forward(8192, 2048, 512, BF16),
        problems.fp8_grad_input(8192, 512, 2048, torch.float32),
    ],
    ids=str,
)
def test_the_memory_bound_holds_while_a_sample_is_made(problem):
    memory = 4 * 2**20
    part = within(problem, memory)
    assert part != problem
    engine, _, _ = make_engine()
    engine.compress = lambda dense, check: torch.zeros(dense.numel() * 9 // 8, dtype=torch.uint8)
    out = torch.empty(problem.d_shape, dtype=problem.out_dtype)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recorded:
        sample = make_sample(engine, part, out, memory)
    events = recorded.profiler.kineto_results.events()
    changes = [
        event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()) if event.name() == "[memory]"
    ]
    peak = max(itertools.accumulate(changes))
    assert sample.packed.numel() < peak <= memory


def test_a_full_device_is_checked_with_less(monkeypatch):
    problem = problems.forward(4096, 1024, 512, BF16)
    engine, _, _ = make_engine()
    tried = []

    def scarce(engine, part, out, memory):
        tried.append(part)
        if len(tried) < 3:
            raise torch.OutOfMemoryError("out of memory")
        return make_sample(engine, part, out, memory)

    monkeypatch.setattr(module, "make_sample", scarce)
    a, b, _, _ = operands(replace(problem, rows=16, reduction=16, columns=8))
    made = Candidates(engine, problem, Operands(a, b, torch.empty(problem.d_shape, dtype=BF16)), memory=2**21)
    assert made._sample.problem == tried[2] == within(problem, 2**17)
    assert tried[0].rows > tried[1].rows > tried[2].rows
