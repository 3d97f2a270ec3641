"""Products in chunks of tokens: which can be cut, into what, and that each way computes the same."""

import pytest
import torch

from semisparse.errors import ShapeError
from semisparse.gemm import dispatch
from semisparse.gemm import problem as problems
from semisparse.gemm.autotune.algorithm import Choice
from semisparse.gemm.chunks import CHUNK, can_be_cut, pieces, sized
from semisparse.gemm.operands import Operands
from semisparse.gemm.problem import Problem, bucket_of
from tests.gemm.simulated import exact, make_engine, operands, unpack
from tests.gemm.test_dispatch import Decided

BF16 = torch.bfloat16
CUT = [
    problems.forward(40, 32, 48, BF16, bias=True),
    problems.grad_input(33, 32, 48, torch.float16),
    problems.forward(48, 32, 48, BF16),
    problems.fp8_forward(40, 32, 96, BF16),
    problems.fp8_grad_input(48, 32, 96, torch.float32),
]
WHOLE = [
    problems.activation_forward(40, 32, 48, BF16),
    problems.activation_weight(40, 32, 48, torch.float16),
    problems.sampled_weight(40, 32, 48, BF16),
    Problem(32, 48, 40, BF16, "row", "column"),
    Problem(32, 48, 40, BF16, "column", "row"),
    problems.forward(16, 32, 48, BF16),
]


def ran(problem, chunk):
    """Tokens of the products that dispatch started; their result is checked."""
    engine, library, _ = make_engine()
    a, b, out, bias = operands(problem)
    sizes = []
    library.faults[3] = lambda out: sizes.append(out.shape)
    dispatch.multiply(
        problem,
        Operands(engine.compress(a), b, out, bias),
        lambda packed: unpack(packed, problem.rows, problem.reduction, problem.dtype),
        engine=engine,
        tuner=Decided(Choice(3, 3, 1.0, None, "tuned", chunk=chunk)),
    )
    assert torch.equal(out, exact(problem, a, b, bias))
    assert engine.products == len(sizes)
    return [columns for _, columns in sizes]


@pytest.mark.parametrize("problem", CUT, ids=str)
def test_a_product_in_chunks_is_that_of_its_pieces_and_the_last_one_has_the_rest(problem):
    tokens = problem.columns
    assert ran(problem, 16) == [16] * (tokens // 16) + [tokens % 16] * (tokens % 16 > 0)
    assert ran(problem, 32) == [32, tokens - 32]
    assert ran(problem, 64) == ran(problem, None) == [tokens]


@pytest.mark.parametrize("problem", WHOLE, ids=str)
def test_products_that_would_need_copies_or_have_one_chunk_stay_whole(problem):
    assert not can_be_cut(problem, 16)
    assert ran(problem, 16) == [problem.columns]


@pytest.mark.parametrize("problem", CUT, ids=str)
def test_pieces_are_views_and_equal_ones_share_a_problem(problem):
    _, b, out, bias = operands(problem)
    packed = torch.zeros(1, dtype=torch.uint8)
    (first, given), (second, others), *_ = pieces(problem, Operands(packed, b, out, bias), 16)
    assert first is second or second.columns < 16
    assert first == sized(problem, 16)
    assert (given.packed, given.bias, others.bias) == (packed, bias, bias)
    for whole, one, other in ((b, given.b, others.b), (out, given.out, others.out)):
        assert one.data_ptr() == whole.data_ptr()
        assert other.data_ptr() == whole[16:].data_ptr()


@pytest.mark.parametrize("name", ["b", "out"])
def test_a_wrong_number_of_tokens_is_refused(name):
    problem = CUT[0]
    _, b, out, bias = operands(problem)
    given = Operands(torch.zeros(2**12, dtype=torch.uint8), b, out, bias)
    given = given._replace(**{name: torch.cat([getattr(given, name)] * 2)})
    with pytest.raises(ShapeError, match=f"{name} has shape"):
        next(pieces(problem, given, 16))


def test_a_bucket_ends_at_a_chunk():
    """Problems that share a choice are all cut or none."""
    assert bucket_of(CHUNK) == CHUNK < bucket_of(CHUNK + 1)
