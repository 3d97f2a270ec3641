"""When the autotuner cuts a product into chunks of tokens, with made-up times on the simulated library."""

from dataclasses import replace

import pytest
import torch

from semisparse.errors import EngineError
from semisparse.gemm import dispatch
from semisparse.gemm import problem as problems
from semisparse.gemm.autotune.algorithm import Choice
from semisparse.gemm.autotune.in_chunks import MARGIN, faster_way
from semisparse.gemm.autotune.selection import ROUNDS
from semisparse.gemm.chunks import sized
from semisparse.gemm.operands import Operands
from tests.gemm.simulated import SimulatedLibrary, exact, operands, unpack
from tests.gemm.tuning import call

BF16, CHUNK = torch.bfloat16, 16
PROBLEMS = [
    problems.forward(40, 32, 48, BF16, bias=True),
    problems.grad_input(33, 32, 48, torch.float16),
    problems.fp8_forward(48, 32, 96, BF16),
]
LONG = PROBLEMS[0]
WHOLE = Choice(4, 4, 10.0, 50.0, "tuned")


def multiply(tuner, problem):
    """The choice that a product followed; its result is checked."""
    a, b, out, bias = operands(problem)
    given = Operands(tuner._engine.compress(a), b, out, bias)
    choice = dispatch.multiply(
        problem,
        given,
        lambda packed: unpack(packed, problem.rows, problem.reduction, problem.dtype),
        engine=tuner._engine,
        tuner=tuner,
    )
    assert torch.equal(out, exact(problem, a, b, bias))
    return choice


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_chunks_are_chosen_where_the_whole_product_is_slow(make_tuner, timed, problem):
    timed.chunk_share = 0.5
    tuner, library, _ = make_tuner(chunk=CHUNK)
    choice = multiply(tuner, problem)
    assert choice == Choice(4, 4, 5.0, 50.0, "tuned", chunk=CHUNK, whole_us=10.0)
    assert timed.made == 2  # the whole problem and its first piece
    before = len(library.products)
    assert multiply(tuner, problem) is choice
    assert len(library.products) - before == -(-problem.columns // CHUNK)


@pytest.mark.parametrize("share", [1 - MARGIN, 1.0, 1.5])
def test_within_the_noise_of_timing_the_product_stays_whole(make_tuner, timed, share):
    timed.chunk_share = share
    assert multiply(make_tuner(chunk=CHUNK)[0], LONG) == WHOLE


def test_problems_of_one_chunk_and_those_that_cannot_be_cut_are_tuned_once(make_tuner, timed):
    timed.chunk_share = 0.5
    tuner = make_tuner(chunk=CHUNK)[0]
    for made, problem in enumerate((problems.forward(16, 32, 48, BF16), problems.sampled_weight(40, 32, 48, BF16)), 1):
        assert multiply(tuner, problem) == WHOLE
        assert timed.made == made


@pytest.mark.parametrize(("dense_us", "algorithm"), [(12.0, 4), (7.0, 4), (5.0, None), (4.0, None)])
def test_dense_is_compared_with_the_faster_sparse_way(make_tuner, timed, dense_us, algorithm):
    timed.chunk_share, timed.dense_us = 0.5, dense_us
    choice = multiply(make_tuner(chunk=CHUNK)[0], LONG)
    assert (choice.algorithm, choice.sparse_algorithm, choice.chunk) == (algorithm, 4, CHUNK)


def test_the_first_piece_is_tuned_for_itself_and_its_choice_kept(make_tuner, timed):
    timed.chunk_share = 0.5
    tuner = make_tuner(chunk=CHUNK)[0]
    call(tuner, LONG)
    made = timed.made
    piece = sized(LONG, CHUNK)
    assert tuner.known(piece, -1) == call(tuner, piece) == WHOLE
    call(tuner, sized(LONG, 72))
    assert timed.made == made + 1  # its pieces are known
    assert call(make_tuner(chunk=CHUNK)[0], piece) == replace(WHOLE, source="disk")


def test_a_stored_choice_keeps_its_chunks_and_is_not_timed_again(make_tuner, timed):
    timed.chunk_share = 0.5
    first = multiply(make_tuner(chunk=CHUNK)[0], LONG)
    tuner = make_tuner(chunk=CHUNK)[0]
    assert multiply(tuner, LONG) == replace(first, source="disk")
    other = make_tuner(stored=False)[0]
    other.load_state(tuner.state())
    assert multiply(other, LONG) == replace(first, source="shared")
    assert timed.made == 2


def test_a_stored_choice_without_chunks_stays_whole(make_tuner, timed):
    timed.chunk_share = 0.5
    tuner, library, _ = make_tuner(chunk=CHUNK)
    tuner._store.save(tuner.key(LONG, -1), WHOLE)
    assert multiply(tuner, LONG) == replace(WHOLE, source="disk")
    assert (timed.made, library.products) == (0, [4])


def test_an_algorithm_that_is_not_offered_for_the_pieces_is_not_used(make_tuner):
    tuner = make_tuner(chunk=CHUNK)[0]
    offered = tuner._engine.algorithms
    tuner._engine.algorithms = lambda problem, index: range(2) if problem.columns == CHUNK else offered(problem, index)
    choice = replace(WHOLE, chunk=CHUNK)
    assert not tuner._offered(choice, LONG, -1)
    assert tuner._offered(replace(choice, chunk=None), LONG, -1)


def test_the_last_piece_is_checked_with_its_own_number_of_tokens(make_tuner, timed):
    timed.chunk_share = 0.5
    library = SimulatedLibrary()
    library.faults[4] = lambda out: out[:, -1].add_(1) if out.shape[1] == 8 else None
    assert multiply(make_tuner(library, chunk=CHUNK)[0], LONG) == WHOLE
    assert multiply(make_tuner(chunk=CHUNK, stored=False)[0], LONG).chunk == CHUNK


def test_chunks_that_leave_a_piece_unwritten_are_found(make_tuner, timed):
    timed.chunk_share = 0.5
    library = SimulatedLibrary()
    tuner = make_tuner(library, chunk=CHUNK)[0]
    a, b, out, bias = operands(LONG)
    multiplied = library.matmul

    def matmul(handle, plan, alpha, a, b, beta, c, d, *rest):
        if d != out[32:].data_ptr():
            multiplied(handle, plan, alpha, a, b, beta, c, d, *rest)

    library.matmul = matmul
    assert tuner.choose(LONG, -1, Operands(tuner._engine.compress(a), b, out, bias)).chunk is None


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("out of memory"), EngineError("refused")], ids=str)
def test_what_goes_wrong_with_chunks_leaves_the_product_whole(make_tuner, timed, error):
    def time(self, algorithm, repeats, chunk=None):
        if chunk is not None:
            raise error
        return 10.0

    timed.time = time
    choice = multiply(make_tuner(chunk=CHUNK)[0], LONG)
    assert (choice.chunk, choice.sparse_us) == (None, 10.0)
    short = isinstance(error, torch.OutOfMemoryError)
    assert ("out of memory" in choice.note) == short
    assert multiply(make_tuner(chunk=CHUNK)[0], LONG).source == ("tuned" if short else "disk")


def test_chunks_serve_where_no_algorithm_is_right_for_the_whole_problem(make_tuner, timed):
    library = SimulatedLibrary()
    for algorithm in range(6):
        library.faults[algorithm] = lambda out: out.add_(1) if out.shape[1] == LONG.columns else None
    choice = multiply(make_tuner(library, chunk=CHUNK)[0], LONG)
    assert (choice.algorithm, choice.chunk, choice.whole_us) == (4, CHUNK, None)


def test_plans_of_the_sample_and_of_the_whole_product_are_freed(make_tuner, timed):
    timed.chunk_share = 0.5
    tuner = make_tuner(chunk=CHUNK)[0]
    call(tuner, LONG)
    assert tuner._engine.plan_count(-1) == 1  # of the first piece, as its own choice keeps it


def test_the_log_says_how_chunks_compare(make_tuner, timed, caplog):
    caplog.set_level("INFO", "semisparse")
    timed.chunk_share = 0.5
    call(make_tuner(chunk=CHUNK)[0], LONG)
    assert "in chunks of 16 tokens: 0.500 of the time of the whole product" in caplog.text
    assert "cuSPARSELt algorithm 4 in chunks of 16 tokens, 2.00x faster than whole" in caplog.text


@pytest.mark.parametrize(("call_seconds", "rounds"), [(0.0, ROUNDS), (1.0, 1)])
def test_slow_products_are_timed_in_one_round(call_seconds, rounds):
    """On a card whose speed collapses one call may take a large part of a second."""
    now, timed = [0.0], []

    class Slow:
        def fault(self, algorithm, chunk=None):
            return None

        def time(self, algorithm, repeats, chunk=None):
            now[0] += repeats * call_seconds
            timed.append((chunk, repeats))
            return 1e6 if chunk is None else 5e5

    choice = faster_way(WHOLE, Slow(), 3, CHUNK, lambda: now[0])
    assert (choice.sparse_algorithm, choice.sparse_us, choice.whole_us) == (3, 5.0, 10.0)
    assert [chunk for chunk, repeats in timed if repeats > 1] == [None, CHUNK] * rounds
