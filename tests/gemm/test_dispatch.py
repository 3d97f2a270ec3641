"""One product from choice to result, and the masked-dense product it may fall back to."""

import pytest
import torch

from semisparse.errors import ConfigError, EngineError, ShapeError
from semisparse.gemm import dense, dispatch
from semisparse.gemm import problem as problems
from semisparse.gemm.autotune.algorithm import Choice
from semisparse.gemm.operands import Operands
from semisparse.gemm.problem import Problem
from tests.gemm import simulated
from tests.gemm.simulated import exact, make_engine, operands

BF16 = torch.bfloat16
PRODUCTS = [
    problems.forward(24, 32, 48, BF16, bias=True),
    problems.grad_input(24, 32, 48, torch.float16),
    problems.activation_forward(24, 32, 48, BF16),
    problems.activation_weight(24, 32, 48, torch.float16),
    problems.sampled_weight(24, 32, 48, BF16),
    Problem(32, 48, 24, BF16, "row", "row", bias=True),
    problems.fp8_forward(24, 32, 96, BF16),
    problems.fp8_grad_input(24, 32, 96, torch.float32),
    problems.fp8_sampled_weight(24, 32, 48, BF16),
]


class Decided:
    """An autotuner that has made up its mind; keeps what it was asked."""

    def __init__(self, choice, known=True):
        self.choice, self.asked, self.is_known = choice, [], known

    def known(self, problem, index):
        return self.choice if self.is_known else None

    def choose(self, problem, index, operands, dense):
        self.asked.append((operands, dense))
        return self.choice


def multiply(problem, choice, backend="auto", known=True):
    engine, library, _ = make_engine()
    a, b, out, bias = operands(problem)
    tuner = Decided(choice, known)
    followed = dispatch.multiply(
        problem,
        Operands(engine.compress(a), b, out, bias),
        lambda packed: simulated.unpack(packed, problem.rows, problem.reduction, problem.dtype),
        backend,
        engine=engine,
        tuner=tuner,
    )
    assert torch.equal(out, exact(problem, a, b, bias))
    assert engine.products == len(library.products)
    return followed, library, tuner


@pytest.mark.parametrize("problem", PRODUCTS, ids=str)
@pytest.mark.parametrize(
    ("choice", "backend", "algorithm"),
    [
        (Choice(3, 3, 1.0, 2.0, "tuned"), "auto", 3),
        (Choice(None, 3, 2.0, 1.0, "tuned"), "auto", None),
        (Choice(None, 3, 2.0, 1.0, "tuned"), "cusparselt", 3),
        (Choice(3, 3, 1.0, 2.0, "tuned"), "dense", None),
    ],
)
def test_the_choice_is_followed_and_every_way_gives_the_same_result(problem, choice, backend, algorithm):
    followed, library, tuner = multiply(problem, choice, backend)
    assert library.products == ([] if algorithm is None else [algorithm])
    assert followed is (None if backend == "dense" else choice)
    assert tuner.asked == []


def test_an_unknown_problem_is_offered_with_a_dense_alternative():
    choice = Choice(2, 2, 1.0, 2.0, "tuned")
    _, library, tuner = multiply(PRODUCTS[0], choice, known=False)
    ((given, dense_alternative),) = tuner.asked
    expected = given.out.clone()
    given.out.fill_(float("nan"))
    dense_alternative(PRODUCTS[0], given)
    assert torch.equal(given.out, expected)
    assert library.products == [2]


def test_a_very_large_operand_is_not_unpacked_to_be_timed(monkeypatch):
    monkeypatch.setattr(dispatch, "MEMORY", 32 * 48 * 2 - 1)
    _, _, tuner = multiply(PRODUCTS[0], Choice(2, 2, 1.0, None, "tuned"), known=False)
    assert tuner.asked[0][1] is None


def test_no_right_algorithm_is_an_error_only_where_sparse_was_demanded():
    choice = Choice(None, None, None, None, "tuned", ((0, "wrong: other bits in run 2"),))
    multiply(PRODUCTS[0], choice)
    with pytest.raises(EngineError, match=r"0: wrong: other bits in run 2\); use backend='auto'"):
        multiply(PRODUCTS[0], choice, "cusparselt")
    with pytest.raises(EngineError, match="no plan"):
        multiply(PRODUCTS[0], Choice(None, None, None, None, "tuned", note="no plan"), "cusparselt")


def test_an_unknown_backend_is_refused():
    with pytest.raises(ConfigError, match="backend='fast'"):
        multiply(PRODUCTS[0], None, "fast")


@pytest.mark.parametrize("problem", PRODUCTS, ids=str)
@pytest.mark.parametrize("strided", [False, True])
def test_the_dense_product_writes_the_same_storage(problem, strided):
    a, b, out, bias = operands(problem)
    dense.product(
        problem, a.mT.contiguous().mT if strided else a, Operands(a.mT.contiguous().mT if strided else a, b, out, bias)
    )
    assert torch.equal(out, exact(problem, a, b, bias))


def test_the_dense_product_of_e4m3_takes_a_row_major_operand():
    problem = Problem(32, 96, 32, torch.float8_e4m3fn, "row", "column", out_dtype=BF16)
    a, b, out, _ = operands(problem)
    dense.product(problem, a, Operands(a, b, out))
    assert torch.equal(out, exact(problem, a, b, None))


def test_the_dense_product_takes_sizes_that_the_engine_does_not():
    problem = Problem(7, 12, 5, BF16, bias=True)
    assert problem.refusal()
    a, b, bias = torch.ones(7, 12, dtype=BF16), torch.ones(5, 12, dtype=BF16), torch.ones(7, dtype=BF16)
    out = torch.empty(5, 7, dtype=BF16)
    dense.product(problem, a, Operands(a, b, out, bias))
    assert torch.equal(out, torch.full_like(out, 13))


def test_the_dense_product_works_on_parameters_and_records_nothing():
    problem = PRODUCTS[0]
    a, b, out, bias = operands(problem)
    dense.product(
        problem, a.requires_grad_(), Operands(a.requires_grad_(), b.requires_grad_(), out, bias.requires_grad_())
    )
    assert not out.requires_grad


@pytest.mark.parametrize("name", ["a", "b", "out", "bias"])
def test_the_dense_product_refuses_a_wrong_shape(name):
    problem = PRODUCTS[0]
    given = dict(zip(("a", "b", "out", "bias"), operands(problem), strict=True))
    given[name] = given[name][:-1]
    with pytest.raises(ShapeError, match=rf"^{name} has shape"):
        dense.product(problem, given["a"], Operands(given["a"], given["b"], given["out"], given["bias"]))


def test_the_scales_of_a_dense_fp8_product_on_a_gpu_are_fp32_whatever_the_default_dtype_is(monkeypatch):
    class OnCuda(torch.Tensor):
        device = torch.device("cuda")

    seen = []
    monkeypatch.setattr(torch, "_scaled_mm", lambda left, right, *scales, **_: seen.extend(scales))
    codes = torch.zeros(16, 16, dtype=torch.float8_e4m3fn).as_subclass(OnCuda)
    torch.set_default_dtype(BF16)
    try:
        dense._fp8_product(codes, codes, torch.empty(16, 16, dtype=BF16))
    finally:
        torch.set_default_dtype(torch.float32)
    assert [(one.dtype, float(one)) for one in seen] == [(torch.float32, 1.0)] * 2
