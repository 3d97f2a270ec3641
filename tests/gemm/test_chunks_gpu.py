"""Products in chunks of tokens on a real GPU: exact results, one that is captured, tuning."""

import pytest
import torch

from semisparse.formats.layout import FP8
from semisparse.gemm import dense, dispatch
from semisparse.gemm import problem as problems
from semisparse.gemm.autotune.algorithm import Choice
from semisparse.gemm.autotune.autotuner import Autotuner
from semisparse.gemm.autotune.candidates import Candidates
from semisparse.gemm.operands import Operands
from tests.gemm.products import product, whole
from tests.gemm.test_dispatch import Decided

pytestmark = pytest.mark.gpu

BF16, CHUNK = torch.bfloat16, 1024
TOKENS = 2 * CHUNK + 456  # the last piece is smaller, and no multiple of 128
PRODUCTS = [
    problems.forward(TOKENS, 1024, 512, BF16, bias=True),
    problems.grad_input(TOKENS, 1024, 512, torch.float16),
    problems.fp8_forward(TOKENS, 1024, 512, BF16),
    problems.fp8_grad_input(TOKENS, 1024, 512, torch.float32),
]


@pytest.fixture(params=PRODUCTS, ids=str)
def problem(request):
    if request.param.dtype is FP8 and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs capability 8.9")
    return request.param


def multiply(engine, problem, operands, chunk):
    choice = Choice(0, 0, None, None, "tuned", chunk=chunk)
    dispatch.multiply(problem, operands, lambda packed: packed, engine=engine, tuner=Decided(choice))


def test_chunks_are_the_whole_product_and_can_be_captured(engine, problem):
    a, b, out, bias = whole(problem)
    given = Operands(engine.compress(a), b, out, bias)
    right = product(problem, a, b, bias, torch.float32).to(problem.out_dtype)
    before = engine.products
    multiply(engine, problem, given, CHUNK)
    assert engine.products - before == 3
    assert torch.equal(out, right)
    multiply(engine, problem, given._replace(out=out.fill_(float("nan"))), None)
    assert torch.equal(out, right)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        multiply(engine, problem, given, CHUNK)
    out.fill_(float("nan"))
    graph.replay()
    assert torch.equal(out, right)


def test_both_ways_are_tuned_and_the_choice_is_right(engine, problem):
    a, b, out, bias = whole(problem)
    given = Operands(engine.compress(a), b, out, bias)
    tuner = Autotuner(engine, None, shipped=tuple, chunk=CHUNK)
    choice = tuner.choose(problem, 0, given, lambda asked, its: dense.product(asked, a, its))
    assert choice.chunk in (None, CHUNK)
    assert choice.note == ""
    assert len(tuner.choices()) == 2  # of the problem and of its first piece
    candidates = Candidates(engine, problem, given)
    assert candidates.fault(choice.sparse_algorithm, CHUNK) is None
    assert candidates.time(choice.sparse_algorithm, 3, CHUNK) > 0
    candidates.close(keep=None)
