"""What C++ asks of Python: wrong operands give Python's typed errors, and exceptions keep their type in eager calls."""

import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from semisparse import errors, native, ops
from semisparse.native.fallback import in_python
from semisparse.native.structures import LaunchKind
from tests.native import fp8
from tests.native.conftest import Bench
from tests.native.hot import FAKES
from tests.native.test_products import DTYPE, K, N, call, integers, operands, prepared

WRONG: list[tuple[str, str, Callable[[Any], Any], type[Exception], str]] = [
    ("packed_matmul", "x", lambda x: x.float(), errors.TensorError, "dtype=torch.float32 has no 2:4 product"),
    ("packed_matmul", "x", lambda x: x.repeat(1, 2), errors.ShapeError, "packed has shape"),
    ("packed_matmul", "packed", lambda p: p[:-2048], errors.ShapeError, "packed has shape"),
    ("packed_matmul", "packed", lambda p: p[:0], errors.ShapeError, "packed has shape"),
    ("packed_matmul", "packed", lambda p: p.view(torch.int8), errors.TensorError, "packed has dtype torch.int8"),
    ("packed_matmul", "bias", lambda b: b[:16], errors.ShapeError, "bias has shape"),
    ("packed_matmul", "bias", lambda b: b.repeat(2), errors.ShapeError, "bias has shape"),
    ("packed_matmul", "bias", lambda b: b.half(), errors.TensorError, "bias has dtype torch.float16"),
    ("packed_matmul", "backend", lambda _: "fast", errors.ConfigError, "backend='fast'"),
    ("pack_linear", "x", lambda x: x.float(), errors.TensorError, "float32"),
    ("pack_linear", "weight", lambda w: w[:30], errors.ShapeError, "multiples of 16"),
    ("pack_linear", "bias", lambda b: b.half(), errors.TensorError, "bias has dtype torch.float16"),
    ("pack_linear", "mask", lambda _: "none", errors.ConfigError, "none"),
    ("packed_tokens_matmul", "packed", lambda p: p[:-2048], errors.ShapeError, "packed has shape"),
    ("packed_tokens_matmul", "weight", lambda w: w.double(), errors.TensorError, "float64 has no 2:4 product"),
    ("packed_tokens_grad_weight", "packed_t", lambda p: p[:-2048], errors.ShapeError, "packed has shape"),
    ("packed_tokens_grad_weight", "grad_output", lambda g: g.float(), errors.TensorError, "float32"),
    ("sampled_grad_weight", "x", lambda x: x.half(), errors.TensorError, "x is torch.float16 on cpu"),
    ("sampled_grad_weight", "x", lambda x: x[:8], errors.ShapeError, "of the same tokens"),
    ("sampled_grad_weight", "grad_output", lambda g: g.float(), errors.TensorError, "float32"),
    ("sampled_grad_weight", "seed", lambda seed: seed.int(), errors.TensorError, "seed is torch.int32"),
    ("sampled_grad_weight", "seed", lambda seed: seed[None], errors.TensorError, r"seed is torch.int64 \(1,\)"),
]


@pytest.mark.parametrize(("name", "operand", "change", "error", "message"), WRONG)
def test_an_operand_that_does_not_fit_a_prepared_call_raises_the_typed_error(
    bench: Bench, name: str, operand: str, change: Callable[[Any], Any], error: type[Exception], message: str
) -> None:
    given = operands(name, 16)
    prepared(bench, name, given)
    before = list(bench.hot.foreign.workspaces)
    bench.hot.asked.clear()
    with pytest.raises(error, match=message) as raised:
        call(bench, name, given | {operand: change(given[operand])})()
    assert (type(raised.value), bench.hot.asked) == (error, [name])
    assert bench.hot.foreign.workspaces == before
    bench.hot.natively(call(bench, name, given))


class Own(Exception):
    """An exception with more than a message."""

    def __init__(self, number: int) -> None:
        super().__init__(f"number {number}, \u00fcber 100 %s {{}}\nsecond line")
        self.number = number


def raising(error: BaseException) -> Callable[..., Any]:
    def implementation(*_: Any) -> Any:
        raise error

    return implementation


@pytest.mark.parametrize("name", FAKES)
@pytest.mark.parametrize(
    "error",
    [Own(7), errors.EngineError("no engine"), torch.OutOfMemoryError("CUDA out of memory"), RuntimeError(""),
     KeyboardInterrupt(), SystemExit(3), NotImplementedError("not here")],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_an_eager_call_raises_the_very_exception_of_python(bench: Bench, name: str, error: BaseException) -> None:
    bench.hot.python[name] = raising(error)
    bench.hot.foreign.failing.add("scaled_mm")  # which needs no preparation
    packed = ops.pack(integers(N, K), DTYPE, "transposable")[0]
    given = {
        "pack": (integers(N, K), DTYPE, "transposable"),
        "pack_transpose": (integers(N, K), DTYPE, "transposable"),
        "pack_tokens": (integers(N, K), DTYPE),
        "unpack": (packed, N, K, DTYPE),
        **{op: fp8.arguments(op) for op in fp8.OPS},
    }.get(name) or tuple(operands(name).values())
    for _ in range(2):
        with pytest.raises(type(error)) as raised:
            getattr(bench.hot.ops, name)(*given)
        assert raised.value is error
        assert raised.value.__cause__ is None


def unpack(bench: Bench) -> Any:
    return bench.hot.ops.unpack(torch.zeros(8192, dtype=torch.uint8), N, K, DTYPE)


def test_an_exception_belongs_to_the_thread_that_it_was_raised_in(bench: Bench) -> None:
    barrier, found = threading.Barrier(4), {}

    def implementation(*_: Any) -> Any:
        barrier.wait(timeout=30)
        raise Own(threading.get_ident())

    def work() -> None:
        try:
            unpack(bench)
        except Own as error:
            found[threading.get_ident()] = error.number

    bench.hot.python["unpack"] = implementation
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(thread == number for thread, number in found.items())


def test_another_error_is_not_taken_for_a_kept_one(bench: Bench) -> None:
    """Compiled code leaves an exception that nobody takes."""
    bench.hot.python["unpack"] = raising(Own(1))
    with pytest.raises(RuntimeError, match="Own: number 1"):
        torch.ops.semisparse_test.unpack(torch.zeros(8192, dtype=torch.uint8), N, K, DTYPE)
    other = RuntimeError("another")
    assert native.typed(other) is other
    bench.hot.python["unpack"] = raising(Own(2))
    with pytest.raises(Own, match="number 2"):
        unpack(bench)
    other = RuntimeError("Own: number 2")
    assert native.typed(other) is other  # it was taken


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_a_default_device_changes_nothing(bench: Bench, device: str) -> None:
    bench.hot.python["unpack"] = raising(Own(1))
    packed = ops.pack(integers(N, K), DTYPE, "transposable")[0]
    with torch.device(device):
        with pytest.raises(Own):
            bench.hot.ops.unpack(packed, N, K, DTYPE)
        bench.hot.python["unpack"] = ops.unpack
        assert bench.hot.ops.unpack(packed, N, K, DTYPE).device.type == "cpu"


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_code_raises_a_runtime_error_that_names_the_type(bench: Bench, backend: str) -> None:
    given = operands("packed_matmul")
    torch._dynamo.reset()

    def product(x: torch.Tensor) -> torch.Tensor:
        return bench.hot.ops.packed_matmul(x, *list(given.values())[1:]) + 1

    compiled = torch.compile(product, backend=backend, fullgraph=True)
    expected = product(given["x"])
    for _ in range(2):
        assert torch.equal(compiled(given["x"]), expected)
    bench.hot.interface.forget_products()
    bench.hot.python["packed_matmul"] = raising(errors.EngineError("nothing is prepared"))
    with pytest.raises(RuntimeError, match="EngineError: nothing is prepared") as raised:
        compiled(given["x"])
    assert type(raised.value) is RuntimeError
    torch._dynamo.reset()


def test_a_prepared_op_passes_torchs_own_check(bench: Bench) -> None:
    given = operands("packed_matmul", 16)
    prepared(bench, "packed_matmul", given)
    bench.hot.launch(LaunchKind.UNPACK, (None, DTYPE), (N, K, 0))
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.semisparse_test.packed_matmul.default, tuple(given.values()), test_utils=utilities)
    torch.library.opcheck(
        torch.ops.semisparse_test.unpack.default, (given["packed"], N, K, DTYPE), test_utils=utilities
    )
    arguments = fp8.arguments("rescale_")  # writes to an operand
    fp8.prepare_kernels(bench, "rescale_", arguments)
    op = torch.ops.semisparse_test.rescale_.default
    bench.hot.natively(lambda: torch.library.opcheck(op, arguments, test_utils=utilities))


def with_a_tensor(kept: list[weakref.ref[torch.Tensor]]) -> None:
    tensor = torch.zeros(1)
    kept.append(weakref.ref(tensor))
    raise ValueError(f"inner {len(kept)}")


def from_a_cause(kept: list[weakref.ref[torch.Tensor]]) -> None:
    try:
        with_a_tensor(kept)
    except ValueError as error:
        raise Own(1) from error


def while_handling(kept: list[weakref.ref[torch.Tensor]]) -> None:
    try:
        with_a_tensor(kept)
    except ValueError:
        raise Own(1)  # noqa: B904


def from_both(kept: list[weakref.ref[torch.Tensor]]) -> None:
    try:
        with_a_tensor(kept)
    except ValueError as error:
        first = error
    try:
        with_a_tensor(kept)
    except ValueError:
        raise Own(1) from first


def in_a_circle(kept: list[weakref.ref[torch.Tensor]]) -> None:
    try:
        with_a_tensor(kept)
    except ValueError as error:
        other = Own(1)
        error.__cause__ = other
        raise other from error


FAILURES = [with_a_tensor, from_a_cause, while_handling, from_both, in_a_circle]


@pytest.mark.parametrize("failure", FAILURES)
def test_an_exception_that_nobody_takes_keeps_no_tensors(failure: Callable[..., None]) -> None:
    kept: list[weakref.ref[torch.Tensor]] = []
    in_python(lambda x: failure(kept), 1)(torch.zeros(1))
    assert kept and not any(tensor() is not None for tensor in kept)


def test_frames_of_an_exception_that_was_handled_before_the_call_are_left_alone() -> None:
    kept: list[weakref.ref[torch.Tensor]] = []
    try:
        with_a_tensor(kept)
    except ValueError:
        in_python(raising(Own(1)), 1)(torch.zeros(1))
        assert kept[0]() is not None


@pytest.mark.parametrize("failure", [from_a_cause, while_handling])
def test_an_eager_call_keeps_what_an_exception_came_from(bench: Bench, failure: Callable[..., None]) -> None:
    bench.hot.python["unpack"] = lambda *_: failure([])
    with pytest.raises(Own) as raised:
        unpack(bench)
    cause, context = raised.value.__cause__, raised.value.__context__
    assert isinstance(context, ValueError) and cause is (context if failure is from_a_cause else None)


def test_an_exception_that_was_handled_is_given_up_at_once(bench: Bench) -> None:
    bench.hot.python["unpack"] = lambda *_: from_a_cause([])
    gc.disable()
    try:
        try:
            unpack(bench)
        except Own as error:
            kept = weakref.ref(error)
        assert kept() is None
    finally:
        gc.enable()
