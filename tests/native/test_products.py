"""The products in C++: exact results, padding, biases, workspaces, and when they ask Python."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from semisparse import errors, ops
from semisparse.native.structures import LaunchKind
from semisparse.testing import assert_bit_equal, small_integers
from tests.native.conftest import Bench
from tests.native.foreign import STREAM
from tests.native.hot import SUM_ROWS, shifted

DTYPE = torch.bfloat16
K, N = 48, 32
PRODUCTS = ("packed_matmul", "pack_linear", "packed_tokens_matmul", "packed_tokens_grad_weight", "sampled_grad_weight")
DENSE_OPERANDS = [
    ("packed_matmul", "x"), ("pack_linear", "x"), ("packed_tokens_matmul", "weight"),
    ("packed_tokens_grad_weight", "grad_output"), ("sampled_grad_weight", "x"),
]  # fmt: skip
"""The dense operand of each product."""


def integers(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
    return small_integers(shape, seed=sum(shape), dtype=dtype)


def operands(
    name: str,
    tokens: int = 13,
    bias: bool = True,
    dtype: torch.dtype = DTYPE,
    values: Callable[..., Tensor] = integers,
) -> dict[str, Any]:
    """Arguments of an op, by name; products of integers are exact."""
    x, weight = values(tokens, K, dtype=dtype), values(N, K, dtype=dtype)
    given = values(N, dtype=dtype) if bias else None
    if name == "packed_matmul":
        packed = ops.pack(weight, dtype, "transposable")[0]
        return {"x": x, "packed": packed, "bias": given, "out_features": N, "backend": "auto"}
    if name == "pack_linear":
        held = dict.fromkeys(("codes", "scale"))
        return {"x": x, "weight": weight, "bias": given, "mask": "transposable", **held, "backend": "auto"}
    if name == "sampled_grad_weight":
        gradient = values(tokens, N, dtype=dtype)
        return {"grad_output": gradient, "x": x, "seed": torch.tensor(-9), "with_bias": bias, "backend": "auto"}
    packed, packed_t = ops.pack_tokens(x, dtype)
    if name == "packed_tokens_matmul":
        return {"packed": packed, "weight": weight, "bias": given, "tokens": tokens, "backend": "auto"}
    return {"packed_t": packed_t, "grad_output": values(tokens, N, dtype=dtype), "in_features": K, "backend": "auto"}


def call(bench: Bench, name: str, given: dict[str, Any]) -> Callable[[], Any]:
    return lambda: getattr(bench.hot.ops, name)(*given.values())


def assert_as_on_the_cpu(found: Any, name: str, given: dict[str, Any]) -> None:
    """Bit for bit, with one kind of zero."""
    expected = getattr(ops, name)(*given.values())
    for ours, wanted in zip(*(r if isinstance(r, tuple) else (r,) for r in (found, expected)), strict=True):
        assert ours.is_contiguous()
        if ours.dtype.is_floating_point:
            assert_bit_equal(ours + 0.0, wanted + 0.0)
        else:
            assert_bit_equal(ours, wanted)


def prepare_kernels(bench: Bench, name: str, given: dict[str, Any]) -> None:
    """By hand, because on the CPU there are none."""
    if name == "pack_linear":
        weight = given["weight"]
        bench.hot.launch(LaunchKind.PACK, (weight.dtype, given["x"].dtype), (N, K, K), given["mask"])
    if name == "sampled_grad_weight":
        gradient, with_bias = given["grad_output"], given["with_bias"]
        seeded = given["seed"] is not None
        bench.hot.launch(
            LaunchKind.SAMPLE, (gradient.dtype,) * 2, (*gradient.shape, gradient.stride(0)), given=(seeded, with_bias)
        )
        if with_bias:
            bench.hot.launch(LaunchKind.SUM_ROWS, (torch.float32, gradient.dtype), (SUM_ROWS, N, 0))
    if name == "packed_tokens_matmul":
        bench.hot.launch(LaunchKind.ADD_BIAS, (given["weight"].dtype,) * 2, (given["tokens"], N, 0))


def prepared(bench: Bench, name: str, given: dict[str, Any]) -> None:
    """By a first call, as in training."""
    prepare_kernels(bench, name, given)
    assert_as_on_the_cpu(bench.hot.by_python(call(bench, name, given)), name, given)


@pytest.mark.parametrize("dtype", [DTYPE, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", PRODUCTS)
def test_the_first_call_is_pythons_and_the_next_cpps(bench: Bench, name: str, bias: bool, dtype: torch.dtype) -> None:
    given = operands(name, bias=bias, dtype=dtype)
    prepared(bench, name, given)
    before, count = bench.hot.interface.started(), bench.engine.python_products
    guards = bench.hot.foreign.guards
    assert_as_on_the_cpu(bench.hot.natively(call(bench, name, given)), name, given)
    assert bench.hot.foreign.guards - guards == 1  # for all that the op starts
    assert (bench.hot.interface.started() - before, bench.engine.python_products - count) == (1, 0)
    assert set(bench.hot.foreign.streams) == {STREAM}


@pytest.mark.parametrize("tokens", [*range(1, 18), 40])
@pytest.mark.parametrize("name", PRODUCTS)
def test_any_number_of_tokens_is_padded_and_cut_off(bench: Bench, name: str, tokens: int) -> None:
    given = operands(name, tokens)
    prepared(bench, name, given)
    assert_as_on_the_cpu(bench.hot.natively(call(bench, name, given)), name, given)


@pytest.mark.parametrize("shape", [(2, 4), (1, 13), (2, 3, 5), (1,) * 7 + (5,), (), (1,) * 8])
def test_tokens_in_more_dimensions_share_what_was_prepared(bench: Bench, shape: tuple[int, ...]) -> None:
    tokens = torch.Size(shape).numel()
    flat = operands("packed_matmul", tokens)
    prepared(bench, "packed_matmul", flat)
    given = flat | {"x": flat["x"].view(*shape, K)}
    run = bench.hot.by_python if len(shape) > 7 else bench.hot.natively  # C++ takes 8 dimensions
    result = run(call(bench, "packed_matmul", given))
    assert result.shape == (*shape, N)
    assert_as_on_the_cpu(result, "packed_matmul", given)


@pytest.mark.parametrize("tokens", [13, 16])
@pytest.mark.parametrize(("name", "operand"), DENSE_OPERANDS)
def test_dense_operands_may_have_any_strides(bench: Bench, name: str, operand: str, tokens: int) -> None:
    given = operands(name, tokens)
    prepared(bench, name, given)
    dense = given[operand]
    for strided in (dense.mT.contiguous().mT, torch.cat([dense, dense], dim=1)[:, : dense.shape[1]]):
        assert not strided.is_contiguous() or tokens == 1
        other = given | {operand: strided}
        assert_as_on_the_cpu(bench.hot.natively(call(bench, name, other)), name, given)


@pytest.mark.parametrize(
    ("name", "operand"),
    [(name, operand) for name in PRODUCTS for operand in operands(name) if operand not in ("tokens", "mask")
     and isinstance(operands(name)[operand], Tensor)],
)  # fmt: skip
def test_misaligned_operands_are_pythons(bench: Bench, name: str, operand: str) -> None:
    given = operands(name, 16)
    prepared(bench, name, given)
    other = given | {operand: shifted(given[operand])}
    bench.hot.asked.clear()
    if operand.startswith("packed"):
        with pytest.raises(errors.TensorError, match="packed must be contiguous and 16-byte aligned"):
            call(bench, name, other)()
    else:
        assert_as_on_the_cpu(call(bench, name, other)(), name, given)
    assert bench.hot.asked == [name]


@pytest.mark.parametrize("settings", [{"follows_bias": True}, {"follows_bias": False}], ids=["follows", "does not"])
@pytest.mark.parametrize("name", ["packed_matmul", "pack_linear"])
def test_two_layers_of_one_shape_add_their_own_biases(bench: Bench, name: str, settings: dict[str, Any]) -> None:
    first = operands(name)
    second = first | {"bias": first["bias"] + 1}
    prepared(bench, name, first)
    for given in (first, second, second, first, second):
        bench.hot.asked.clear()
        assert_as_on_the_cpu(call(bench, name, given)(), name, given)
        if settings["follows_bias"]:
            assert bench.hot.asked == []


def test_a_refused_bias_leaves_the_plan_as_it_was(bench: Bench) -> None:
    first = operands("packed_matmul")
    second = first | {"bias": first["bias"] + 1}
    prepared(bench, "packed_matmul", first)
    bench.hot.foreign.failing.add("set_attribute")
    assert_as_on_the_cpu(bench.hot.by_python(call(bench, "packed_matmul", second)), "packed_matmul", second)
    bench.hot.foreign.failing.clear()
    for given in (second, first):
        assert_as_on_the_cpu(bench.hot.natively(call(bench, "packed_matmul", given)), "packed_matmul", given)


@pytest.mark.parametrize("settings", [{"workspace": 0}, {"workspace": 100}, {"workspace": 4096}], ids=str)
@pytest.mark.parametrize("name", PRODUCTS)
def test_a_workspace_is_allocated_per_call_and_only_where_it_is_needed(
    bench: Bench, name: str, settings: dict[str, int]
) -> None:
    given = operands(name)
    prepared(bench, name, given)
    for _ in range(2):
        assert_as_on_the_cpu(bench.hot.natively(call(bench, name, given)), name, given)
    assert len(bench.hot.foreign.workspaces) == 2
    for address, size in bench.hot.foreign.workspaces:
        assert size == settings["workspace"]
        assert bool(address) == bool(size)


@pytest.mark.parametrize("settings", [{"workspace": 100}], ids=[""])
@pytest.mark.parametrize("failing", ["matmul", "current_stream", "open_guard"])
@pytest.mark.parametrize("name", PRODUCTS)
def test_what_the_library_refuses_python_does(bench: Bench, name: str, failing: str) -> None:
    given = operands(name)
    prepared(bench, name, given)
    before = bench.hot.interface.started()
    bench.hot.foreign.failing.add(failing)
    assert_as_on_the_cpu(bench.hot.by_python(call(bench, name, given)), name, given)
    assert bench.hot.interface.started() == before
    bench.hot.foreign.failing.clear()
    assert_as_on_the_cpu(bench.hot.natively(call(bench, name, given)), name, given)


def test_where_the_bias_of_tokens_cannot_be_added_python_computes_all(bench: Bench) -> None:
    name = "packed_tokens_matmul"
    given = operands(name)
    assert_as_on_the_cpu(bench.hot.by_python(call(bench, name, given)), name, given)
    assert_as_on_the_cpu(bench.hot.by_python(call(bench, name, given)), name, given)  # no kernel is prepared
    without = given | {"bias": None}
    assert_as_on_the_cpu(bench.hot.natively(call(bench, name, without)), name, without)
    bench.hot.launch(LaunchKind.ADD_BIAS, (DTYPE, DTYPE), (given["tokens"], N, 0))
    bench.hot.natively(call(bench, name, given))
    bench.hot.foreign.failing.add("launch_kernel")
    assert_as_on_the_cpu(bench.hot.by_python(call(bench, name, given)), name, given)


@pytest.mark.parametrize("fact", ["workspace", "d_rows"])
@pytest.mark.parametrize("name", PRODUCTS)
def test_what_cannot_be_allocated_python_does(
    bench: Bench, name: str, fact: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, add = operands(name), bench.hot.interface.add_product

    def too_much(*arguments: Any) -> None:
        setattr(arguments[-1], fact, 1 << 55)
        add(*arguments)

    monkeypatch.setattr(bench.hot.interface, "add_product", too_much)
    prepared(bench, name, given)
    assert_as_on_the_cpu(bench.hot.by_python(call(bench, name, given)), name, given)
    assert bench.hot.foreign.workspaces == []


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_watched_product_is_pythons(bench: Bench, name: str) -> None:
    given = operands(name)
    prepared(bench, name, given)
    bench.hot.interface.watch(1)
    assert_as_on_the_cpu(bench.hot.by_python(call(bench, name, given)), name, given)
    bench.hot.interface.watch(-1)
    bench.hot.natively(call(bench, name, given))


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_plan_serves_the_thread_that_prepared_it_alone(bench: Bench, name: str) -> None:
    given = operands(name)
    prepared(bench, name, given)
    with ThreadPoolExecutor(1) as pool:

        def there() -> Any:
            return pool.submit(call(bench, name, given)).result()

        assert_as_on_the_cpu(bench.hot.by_python(there), name, given)
        assert_as_on_the_cpu(bench.hot.natively(there), name, given)
        bench.hot.natively(call(bench, name, given))
        assert pool.submit(bench.engine.close).result() is None
        bench.hot.natively(call(bench, name, given))
        assert_as_on_the_cpu(bench.hot.by_python(there), name, given)
        pool.submit(bench.engine.close).result()


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_freed_plan_and_forgotten_products_are_asked_of_python_again(bench: Bench, name: str) -> None:
    given = operands(name)
    prepared(bench, name, given)
    bench.engine.close()
    assert [kind for kind, _ in bench.library.live.values()] == []
    assert_as_on_the_cpu(bench.hot.by_python(call(bench, name, given)), name, given)
    bench.hot.natively(call(bench, name, given))
    assert bench.hot.interface.forget_products() == 1
    assert_as_on_the_cpu(bench.hot.by_python(call(bench, name, given)), name, given)
    bench.hot.natively(call(bench, name, given))


def test_a_plan_that_cpp_uses_is_not_freed_for_new_ones(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.engine, "MAX_PLANS", 2)
    busy, idle, *others = (operands("packed_matmul", tokens) for tokens in (8, 16, 24, 32, 40))
    for given in (busy, idle):
        prepared(bench, "packed_matmul", given)
    for given in others:
        bench.hot.natively(call(bench, "packed_matmul", busy))
        prepared(bench, "packed_matmul", given)
    assert_as_on_the_cpu(bench.hot.natively(call(bench, "packed_matmul", busy)), "packed_matmul", busy)
    bench.hot.by_python(call(bench, "packed_matmul", idle))


def test_one_plan_of_several_token_counts_is_dropped_for_all(bench: Bench) -> None:
    for tokens in (9, 13, 16):
        prepared(bench, "packed_matmul", operands("packed_matmul", tokens))
    (plan,) = bench.engine._local.handles[-1].plans.values()
    assert bench.hot.interface.prepared() == 3
    assert bench.hot.interface.drop_plan(plan.address) == 3
    assert bench.hot.interface.drop_plan(plan.address) == 0
    bench.hot.by_python(call(bench, "packed_matmul", operands("packed_matmul", 9)))


def test_calls_that_differ_are_not_prepared_by_one_another(bench: Bench) -> None:
    given = operands("packed_matmul")
    prepared(bench, "packed_matmul", given)
    for other in (
        operands("packed_matmul", 12),
        operands("packed_matmul", bias=False),
        operands("packed_matmul", dtype=torch.float16),
        given | {"backend": "cusparselt"},
    ):
        assert_as_on_the_cpu(bench.hot.by_python(call(bench, "packed_matmul", other)), "packed_matmul", other)


def test_no_tokens_and_no_features_are_pythons(bench: Bench) -> None:
    for name in PRODUCTS:
        given = operands(name, 0)
        for _ in range(2):
            assert_as_on_the_cpu(bench.hot.by_python(call(bench, name, given)), name, given)


def test_a_gradient_with_other_strides_and_one_without_a_seed_are_other_samples(bench: Bench) -> None:
    given = operands("sampled_grad_weight", 16)
    prepared(bench, "sampled_grad_weight", given)
    gradient = given["grad_output"]
    turned = given | {"grad_output": gradient.mT.contiguous().mT}
    assert_as_on_the_cpu(bench.hot.by_python(call(bench, "sampled_grad_weight", turned)), "sampled_grad_weight", given)
    for change in ({"grad_output": torch.cat([gradient, gradient], dim=1)[:, :N]}, {"seed": None}):
        other = given | change
        assert_as_on_the_cpu(
            bench.hot.by_python(call(bench, "sampled_grad_weight", other)), "sampled_grad_weight", other
        )
        prepare_kernels(bench, "sampled_grad_weight", other)
        assert_as_on_the_cpu(
            bench.hot.natively(call(bench, "sampled_grad_weight", other)), "sampled_grad_weight", other
        )
    assert bench.hot.foreign.launched[-2:] == [LaunchKind.SAMPLE, LaunchKind.SUM_ROWS]


def test_a_sample_needs_both_of_its_kernels(bench: Bench) -> None:
    given = operands("sampled_grad_weight", 16)
    gradient = given["grad_output"]
    bench.hot.by_python(call(bench, "sampled_grad_weight", given))
    bench.hot.launch(LaunchKind.SAMPLE, (DTYPE, DTYPE), (*gradient.shape, gradient.stride(0)), given=(True, True))
    bench.hot.by_python(call(bench, "sampled_grad_weight", given))
    bench.hot.launch(LaunchKind.SUM_ROWS, (torch.float32, DTYPE), (SUM_ROWS, N, 0))
    assert_as_on_the_cpu(bench.hot.natively(call(bench, "sampled_grad_weight", given)), "sampled_grad_weight", given)
