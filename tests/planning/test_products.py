"""Which products of the engine a call needs, against what the ops ask for."""

from dataclasses import replace

import pytest
import torch

from semisparse import SparseConfig, ops
from semisparse.gemm import dispatch
from semisparse.gemm.autotune.algorithm import Choice
from semisparse.gemm.problem import Problem
from semisparse.gemm.weight_gradient import WeightGradient
from semisparse.ops import fp8_packed, fp8_sampled_grad, fp8_sampling, prepare, products, sampling
from semisparse.ops.fp8_packed import sums_dtype
from semisparse.planning.problems import LinearProblem
from semisparse.planning.products import engine_products, why_no_engine

M, K, N = 40, 64, 32
BF16 = torch.bfloat16
NOTHING = torch.empty(0, dtype=torch.uint8)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Problem]:
    """What the CUDA side of the ops asks of the engine, which computes nothing here."""
    found: list[Problem] = []
    for module in (products, sampling, fp8_packed, fp8_sampling):
        monkeypatch.setattr(module, "multiply", lambda problem, *rest: found.append(problem))
    monkeypatch.setattr(prepare, "product", lambda *facts: None)
    monkeypatch.setattr(sampling, "_cuda_pack_sample", lambda *operands: (NOTHING, NOTHING))
    return found


def test_a_pruned_weight_in_16_bits(asked: list[Problem]) -> None:
    x, dy = torch.ones(M, K, dtype=BF16), torch.ones(M, N, dtype=BF16)
    products._cuda_packed_matmul(x, NOTHING, torch.ones(N, dtype=BF16), N, "auto")
    products._cuda_packed_matmul(dy, NOTHING, None, K, "auto")
    sampling._cuda_sampled_grad_weight(dy, x, None, True, "auto")
    found = engine_products(LinearProblem(M, K, N), SparseConfig(grad_output="mvue"), fp8=False)
    assert list(found) == ["forward", "grad_input", "grad_weight"]
    assert list(found.values()) == asked


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("grad_output", [None, "mvue"])
def test_a_pruned_weight_in_fp8(asked: list[Problem], dtype: str, grad_output: None) -> None:
    stored = getattr(torch, dtype)
    x, dy = torch.ones(M, K, dtype=stored), torch.ones(M, N, dtype=stored)
    x8, x8t, _ = ops.quantise(x, True, True)
    dy8, packed, *_ = ops.sample_fp8(dy, None, True, None) if grad_output else (ops.quantise(dy, True, False)[0], None)
    fp8_packed._cuda_fp8_product(x8, NOTHING, N, "auto", sums_dtype(stored))
    fp8_packed._cuda_fp8_product(dy8, NOTHING, K, "auto", sums_dtype(stored))
    if packed is not None:
        fp8_sampling._cuda_fp8_sampled_product(packed, x8t, N, "auto", sums_dtype(stored))
    config = SparseConfig(precision="fp8", grad_output=grad_output)
    call = LinearProblem(M, K, N, dtype, dtype, dtype)
    found = engine_products(call, config, fp8=True)
    assert ("sampling" in found) == (grad_output is not None)
    assert [product for name, product in found.items() if name != "sampling"] == asked


def test_whether_a_weight_gradient_in_fp8_is_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[WeightGradient] = []

    def samples(gradient: WeightGradient, *rest: object) -> Choice:
        found.append(gradient)
        raise NotImplementedError

    monkeypatch.setattr(dispatch, "samples", samples)
    _, x8t, scale = ops.quantise(torch.ones(M, K, dtype=BF16), False, True)
    given = torch.ones(M, N, dtype=BF16), x8t, scale, None, True, torch.float32, "auto", torch.float32
    with pytest.raises(NotImplementedError):
        fp8_sampled_grad._cuda_fp8_sampled_grad_weight(*given)
    call = LinearProblem(M, K, N, "bfloat16", "float32", "float32")
    config = SparseConfig(precision="fp8", grad_output="mvue")
    assert [engine_products(call, config, fp8=True)["sampling"]] == found
    assert "sampling" not in engine_products(call, replace(config, backend="cusparselt"), fp8=True)


def test_a_pruned_activation(asked: list[Problem]) -> None:
    weight = torch.ones(N, K, dtype=BF16)
    products._cuda_packed_tokens_matmul(NOTHING, weight, None, M, "auto")
    products._cuda_packed_tokens_grad_weight(NOTHING, torch.ones(M, N, dtype=BF16), K, "auto")
    config = SparseConfig(weight=None, activation="transposable")
    assert list(engine_products(LinearProblem(M, K, N), config, fp8=False).values()) == asked


@pytest.mark.parametrize(
    ("config", "needs", "named"),
    [
        (SparseConfig(), {"grad_input": False}, ["forward"]),
        (SparseConfig(grad_output="mvue"), {"grad_weight": False}, ["forward", "grad_input"]),
        (SparseConfig(weight="row"), {}, ["forward"]),
        (SparseConfig(backend="dense"), {}, []),
        (SparseConfig(weight=None, precision="fp8"), {}, []),
    ],
    ids=str,
)
def test_only_what_is_sparse_and_needed(config: SparseConfig, needs: dict[str, bool], named: list[str]) -> None:
    fp8 = config.precision is not None
    assert list(engine_products(LinearProblem(M, K, N, **needs), config, fp8)) == named


def test_where_there_is_no_engine_the_reason_is_said() -> None:
    weight = torch.ones(N, K, dtype=BF16)
    assert "the weight is on cpu" in why_no_engine(weight, BF16, SparseConfig())
    assert "the weight is on cpu" in why_no_engine(weight, BF16, SparseConfig(precision="fp8"))
    assert "backend='dense'" in why_no_engine(weight, BF16, SparseConfig(backend="dense"))
    assert why_no_engine(weight, BF16, SparseConfig(weight=None, precision="fp8")) == "its weight is not pruned"
