"""Masked-dense products in C++: the bits of Python's, without autograd state, and when they ask Python."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from semisparse import errors
from semisparse.gemm.autotune.algorithm import Choice
from semisparse.gemm.dispatch import observed
from semisparse.native.structures import LaunchKind
from semisparse.ops import prepare
from semisparse.ops.products import dispatch
from semisparse.testing import assert_bit_equal
from tests.native.conftest import Bench
from tests.native.test_products import DENSE_OPERANDS, DTYPE, PRODUCTS, K, N, call, operands, prepare_kernels

BACKENDS = ("auto", "dense")


@pytest.fixture
def choice() -> Choice:
    return Choice(None, 0, None, None, "tuned")


def normal(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
    """Sums of their products are rounded, so that results are the same bits only where the same product ran."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def given_to(name: str, tokens: int = 13, bias: bool = True, dtype: torch.dtype = DTYPE) -> dict[str, Any]:
    return operands(name, tokens, bias, dtype, normal)


def unpacked_sizes(name: str, tokens: int) -> tuple[int, int]:
    """Of the pruned operand, with padding."""
    padded = -(-tokens // 16) * 16
    others = {
        "packed_tokens_matmul": (padded, K),
        "packed_tokens_grad_weight": (K, padded),
        "sampled_grad_weight": (N, padded),
    }
    return others.get(name, (N, K))


def prepared(bench: Bench, name: str, given: dict[str, Any], tokens: int = 13) -> Any:
    """What Python computes in a first call, after which C++ has all that it needs."""
    prepare_kernels(bench, name, given)
    dtype = next(given[operand] for operand in ("x", "weight", "grad_output") if operand in given).dtype
    bench.hot.launch(LaunchKind.UNPACK, (None, dtype), (*unpacked_sizes(name, tokens), 0))
    return bench.hot.by_python(call(bench, name, given))


def assert_same(found: Any, expected: Any) -> None:
    for ours, wanted in zip(*(r if isinstance(r, tuple) else (r,) for r in (found, expected)), strict=True):
        assert ours.is_contiguous()
        assert_bit_equal(ours, wanted)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [DTYPE, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", PRODUCTS)
def test_the_next_call_is_cpps_with_the_same_bits_and_is_no_sparse_product(
    bench: Bench, name: str, bias: bool, dtype: torch.dtype, backend: str
) -> None:
    given = given_to(name, bias=bias, dtype=dtype) | {"backend": backend}
    expected = prepared(bench, name, given)
    sparse, dense = bench.hot.interface.started(), bench.hot.interface.started_dense()
    guards = bench.hot.foreign.guards
    assert_same(bench.hot.natively(call(bench, name, given)), expected)
    assert (bench.hot.interface.started() - sparse, bench.engine.python_products) == (0, 0)
    assert bench.hot.interface.started_dense() - dense == 1
    assert bench.hot.foreign.guards - guards == 1
    with_addmm = bias and name in ("packed_matmul", "pack_linear")
    assert bench.hot.foreign.multiplied == ["addmm" if with_addmm else "mm"]


@pytest.mark.parametrize("tokens", [*range(1, 18), 40])
@pytest.mark.parametrize("name", PRODUCTS)
def test_any_number_of_tokens_is_padded_and_cut_off(bench: Bench, name: str, tokens: int) -> None:
    given = given_to(name, tokens)
    expected = prepared(bench, name, given, tokens)
    assert_same(bench.hot.natively(call(bench, name, given)), expected)


@pytest.mark.parametrize("shape", [(2, 4), (1, 13), (2, 2, 4), (2, 3, 5), (1,) * 6 + (5,), ()])
def test_tokens_in_more_dimensions_share_what_was_prepared(bench: Bench, shape: tuple[int, ...]) -> None:
    flat = given_to("packed_matmul", torch.Size(shape).numel())
    expected = prepared(bench, "packed_matmul", flat)
    result = bench.hot.natively(call(bench, "packed_matmul", flat | {"x": flat["x"].view(*shape, K)}))
    assert_same(result, expected.view(*shape, N))


@pytest.mark.parametrize("tokens", [13, 16])
@pytest.mark.parametrize(("name", "operand"), DENSE_OPERANDS)
def test_dense_operands_may_have_any_strides(bench: Bench, name: str, operand: str, tokens: int) -> None:
    given = given_to(name, tokens)
    expected = prepared(bench, name, given, tokens)
    turned = given[operand].mT.contiguous().mT
    assert_same(bench.hot.natively(call(bench, name, given | {operand: turned})), expected)


@pytest.mark.parametrize("tokens", [13, 16])
@pytest.mark.parametrize("name", PRODUCTS)
def test_results_have_no_autograd_state_whatever_the_operands_have(bench: Bench, name: str, tokens: int) -> None:
    given = given_to(name, tokens)
    expected = prepared(bench, name, given, tokens)
    for value in given.values():
        if isinstance(value, Tensor) and value.is_floating_point():
            value.requires_grad_()
    found = bench.hot.natively(call(bench, name, given))
    assert_same(found, expected)
    for result in found if isinstance(found, tuple) else (found,):
        assert not result.requires_grad
        assert result.grad_fn is None
        assert not result._is_view()
        result.add_(1)


@pytest.mark.parametrize("name", PRODUCTS)
def test_autocast_and_inference_mode_change_nothing(bench: Bench, name: str) -> None:
    given = given_to(name, dtype=torch.float16)
    expected = prepared(bench, name, given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(bench.hot.natively(call(bench, name, given)), expected)
    with torch.inference_mode():
        assert_same(bench.hot.natively(call(bench, name, given)), expected)


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_watched_product_is_pythons_and_is_told(bench: Bench, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch.native, "watch", bench.hot.interface.watch)
    given, told = given_to(name), []
    expected = prepared(bench, name, given)
    with observed(lambda _, algorithm, choice: told.append(algorithm)):
        assert_same(bench.hot.by_python(call(bench, name, given)), expected)
    assert told == [None]
    bench.hot.natively(call(bench, name, given))
    assert told == [None]


@pytest.mark.parametrize("name", PRODUCTS)
def test_where_the_kernel_that_unpacks_is_not_prepared_python_computes_all(bench: Bench, name: str) -> None:
    given = given_to(name)
    prepare_kernels(bench, name, given)
    for _ in range(2):
        bench.hot.by_python(call(bench, name, given))
    assert bench.hot.foreign.multiplied == []


@pytest.mark.parametrize("failing", ["mm and addmm", "launch_kernel", "current_stream", "open_guard"])
@pytest.mark.parametrize("name", PRODUCTS)
def test_what_is_refused_python_does(bench: Bench, name: str, failing: str) -> None:
    given = given_to(name)
    expected = prepared(bench, name, given)
    before = bench.hot.interface.started_dense()
    bench.hot.foreign.failing.update(failing.split(" and "))
    assert_same(bench.hot.by_python(call(bench, name, given)), expected)
    assert bench.hot.interface.started_dense() == before
    bench.hot.foreign.failing.clear()
    assert_same(bench.hot.natively(call(bench, name, given)), expected)


WRONG: list[tuple[str, str, Callable[[Any], Any], type[Exception]]] = [
    ("packed_matmul", "x", lambda x: x.float(), errors.TensorError),
    ("packed_matmul", "packed", lambda p: p[:64], RuntimeError),
    ("packed_matmul", "bias", lambda b: b[:16], errors.ShapeError),
    ("pack_linear", "bias", lambda b: b.repeat(2), errors.ShapeError),
    ("packed_tokens_matmul", "weight", lambda w: w.float(), errors.TensorError),
    ("packed_tokens_grad_weight", "packed_t", lambda p: p[:64], RuntimeError),
]


@pytest.mark.parametrize(("name", "operand", "change", "error"), WRONG)
def test_an_operand_that_does_not_fit_raises_pythons_error(
    bench: Bench, name: str, operand: str, change: Callable[[Any], Any], error: type[Exception]
) -> None:
    given = given_to(name)
    prepared(bench, name, given)
    bench.hot.asked.clear()
    with pytest.raises(error):
        call(bench, name, given | {operand: change(given[operand])})()
    assert (bench.hot.asked, bench.hot.foreign.multiplied) == ([name], [])


@pytest.mark.parametrize("name", PRODUCTS)
def test_another_choice_replaces_the_product_once_all_are_forgotten(
    bench: Bench, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = given_to(name)
    prepared(bench, name, given)
    other = Choice(0, 0, None, None, "shared")
    monkeypatch.setattr(prepare.autotuner(), "known", lambda *_: other)
    assert bench.hot.interface.forget_products() == 1  # as Autotuner.load_state does
    bench.hot.by_python(call(bench, name, given))
    sparse = bench.hot.interface.started()
    bench.hot.natively(call(bench, name, given))
    assert (bench.hot.interface.started() - sparse, bench.hot.foreign.multiplied) == (1, [])
    assert bench.engine.python_products == 1


def test_a_choice_that_tuning_may_replace_is_not_handed_over(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    given = given_to("packed_matmul")
    monkeypatch.setattr(prepare, "autotuner", lambda: type("Undecided", (), {"known": lambda *_: None}))
    prepared(bench, "packed_matmul", given)
    bench.hot.by_python(call(bench, "packed_matmul", given))


def test_freed_plans_leave_masked_dense_products_alone(bench: Bench) -> None:
    given = given_to("packed_matmul")
    prepared(bench, "packed_matmul", given)
    sparse = given | {"backend": "cusparselt"}
    bench.hot.by_python(call(bench, "packed_matmul", sparse))
    bench.hot.natively(call(bench, "packed_matmul", sparse))
    bench.engine.close()
    bench.hot.natively(call(bench, "packed_matmul", given))
    bench.hot.by_python(call(bench, "packed_matmul", sparse))
