"""Products that run in chunks go through Python; those that cannot be cut, and masked-dense ones, do not."""

import pytest

from semisparse.gemm.autotune.algorithm import Choice
from semisparse.native.structures import LaunchKind
from tests.native.conftest import Bench
from tests.native.test_products import DTYPE, K, N, assert_as_on_the_cpu, call, operands, prepared

TOKENS = 40


@pytest.fixture
def choice() -> Choice:
    return Choice(0, 0, None, None, "tuned", chunk=16)


def test_a_product_in_chunks_stays_with_python(bench: Bench) -> None:
    given = operands("packed_matmul", TOKENS)
    for _ in range(2):
        before = bench.engine.python_products
        assert_as_on_the_cpu(bench.hot.by_python(call(bench, "packed_matmul", given)), "packed_matmul", given)
        assert bench.engine.python_products - before == 3


@pytest.mark.parametrize(
    ("name", "tokens"), [("packed_matmul", 13), ("packed_tokens_matmul", TOKENS), ("packed_tokens_grad_weight", TOKENS)]
)
def test_a_whole_product_is_handed_over(bench: Bench, name: str, tokens: int) -> None:
    given = operands(name, tokens)
    prepared(bench, name, given)
    assert_as_on_the_cpu(bench.hot.natively(call(bench, name, given)), name, given)


@pytest.mark.parametrize("choice", [Choice(None, 0, None, None, "tuned", chunk=16)])
def test_masked_dense_is_handed_over(bench: Bench, choice: Choice) -> None:
    given = operands("packed_matmul", TOKENS)
    bench.hot.launch(LaunchKind.UNPACK, (None, DTYPE), (N, K, 0))
    prepared(bench, "packed_matmul", given)
    assert_as_on_the_cpu(bench.hot.natively(call(bench, "packed_matmul", given)), "packed_matmul", given)
