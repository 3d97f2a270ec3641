"""The ops of fp8 and their formulas in plain PyTorch against the specification."""

import sys

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from semisparse import ops
from semisparse.errors import ShapeError, TensorError
from semisparse.formats.layout import FP8
from semisparse.ops import fp8 as fp8_ops
from semisparse.ops.fp8 import MULTIPLE
from semisparse.reference import fp8
from semisparse.testing import assert_bit_equal

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
on_the_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="here the CPU plays the device")
WANTED = [(True, True), (True, False), (False, True)]
NUMBERS = torch.arange(2**16, dtype=torch.int32).to(torch.int16)


def made(tokens: int, columns: int, dtype: torch.dtype) -> Tensor:
    return (torch.randn(tokens, columns) * torch.randn(columns).exp()).to(dtype)


def with_one(value: float) -> Tensor:
    x = made(7, 32, torch.float32)
    x[3, 5] = value
    return x


def numbers_up_to(limit: float, dtype: torch.dtype) -> Tensor:
    """All numbers of a 16-bit dtype, those that are larger than limit as 0; NaN and Inf where limit is NaN."""
    numbers = NUMBERS.view(dtype).view(256, 256)
    return numbers if limit != limit else torch.where(numbers.float().abs() <= limit, numbers, 0)


INPUTS = {
    "one row": lambda: made(1, 32, torch.bfloat16),
    "13 rows of fp16": lambda: made(13, 96, torch.float16),
    "50 rows of fp32": lambda: made(50, 64, torch.float32),
    "whole": lambda: made(32, 32, torch.bfloat16),
    "no rows": lambda: made(0, 32, torch.bfloat16),
    "zeros": lambda: torch.zeros(5, 32, dtype=torch.bfloat16),
    "subnormal": lambda: made(5, 32, torch.float32) * 1e-41,
    "subnormal fp16": lambda: (made(5, 32, torch.float32) * 1e-6).half(),
    "transposed": lambda: made(64, 13, torch.bfloat16).mT,
    "every second column": lambda: made(9, 64, torch.float16)[:, ::2],
    "part of rows": lambda: made(9, 96, torch.bfloat16)[:, 32:64],
    "NaN": lambda: with_one(float("nan")),
    "Inf": lambda: with_one(-float("inf")),
}
FINITE = {name: make for name, make in INPUTS.items() if name not in ("NaN", "Inf")}
EACH_INPUT = pytest.mark.parametrize("make", INPUTS.values(), ids=INPUTS)


def specified(x: Tensor) -> tuple[Tensor, Tensor]:
    """The codes of x with rows of zeros, as bytes, and its scale."""
    multiplier = fp8.multiplier_for(fp8.largest_magnitude(x))
    codes = fp8.quantise(x, multiplier).view(torch.uint8)
    return torch.cat([codes, codes.new_zeros(-x.shape[0] % MULTIPLE, x.shape[1])]), 1 / multiplier


def assert_quantised(found: tuple[Tensor, Tensor, Tensor], x: Tensor, rows: bool, columns: bool) -> None:
    codes, scale = specified(x)
    x8, x8t, found_scale = found
    for result, wanted, expected in ((x8, rows, codes), (x8t, columns, codes.mT)):
        assert result.dtype == FP8 and result.is_contiguous()
        assert_bit_equal(result.view(torch.uint8), expected if wanted else codes.new_zeros(0))
    assert_bit_equal(found_scale, scale)


@pytest.mark.parametrize(("rows", "columns"), WANTED, ids=["both", "rows", "columns"])
@EACH_INPUT
def test_quantise_is_the_specification(make, rows: bool, columns: bool) -> None:
    x = make()
    assert_quantised(ops.quantise(x, rows, columns), x, rows, columns)
    assert_quantised(ops.quantise_formula(x, rows, columns), x, rows, columns)


@pytest.mark.parametrize("limit", [float("nan"), 1e38, 448.0, 449.0, 1.75, 2e-3, 1e-9, 1e-30, 1e-38])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_16_bit_number_is_rounded_as_specified(dtype: torch.dtype, limit: float) -> None:
    x = numbers_up_to(limit, dtype)
    assert_quantised(ops.quantise(x, True, True), x, True, True)
    assert_quantised(ops.quantise_formula(x, True, True), x, True, True)


def compiled_anew(formula):
    """formula compiled, with no memory of how often it was before."""
    torch.compiler.reset()
    return torch.compile(formula, fullgraph=True)


def test_compiled_the_formula_gives_the_same_bits() -> None:
    compiled = compiled_anew(ops.quantise_formula)
    for limit in (float("nan"), 1e38, 448.0, 2e-3, 1e-30):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            x = numbers_up_to(limit, torch.bfloat16 if dtype == torch.float32 else dtype).to(dtype)
            assert_quantised(compiled(x, True, True), x, True, True)
    for name in ("no rows", "13 rows of fp16", "every second column", "NaN"):
        compiled = compiled_anew(ops.quantise_formula)
        assert_quantised(compiled(x := INPUTS[name](), True, False), x, True, False)


@pytest.mark.filterwarnings("ignore:.*is non-deterministic.*")
@pytest.mark.parametrize("make", FINITE.values(), ids=FINITE)  # opcheck finds that NaN as e4m3 differs from itself
def test_opcheck_of_quantise(make) -> None:
    torch.library.opcheck(torch.ops.semisparse.quantise.default, (make(), True, True))
    torch.library.opcheck(torch.ops.semisparse.quantise.default, (make(), False, True))


def test_shapes_of_fake_tensors_follow_the_tokens() -> None:
    def both(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return ops.quantise(x, True, True)

    compiled = torch.compile(both, fullgraph=True, dynamic=True)
    for tokens in (13, 16, 50):
        assert_quantised(compiled(x := made(tokens, 32, torch.bfloat16)), x, True, True)
    with FakeTensorMode() as mode:
        x8, x8t, scale = both(mode.from_tensor(made(13, 32, torch.bfloat16)))
        assert (x8.shape, x8t.shape, scale.shape) == ((16, 32), (32, 16), ())


@pytest.mark.parametrize("call", [ops.quantise, ops.quantise_formula])
def test_other_matrices_are_refused(call) -> None:
    for shape in ((4, 24), (32,), (2, 4, 32)):
        with pytest.raises(ShapeError, match="K a multiple of 16"):
            call(torch.zeros(shape), True, True)
    with pytest.raises(TensorError, match=r"x is torch\.float64"):
        call(torch.zeros(4, 32, dtype=torch.float64), True, True)


@on_the_cpu
@pytest.mark.parametrize(("rows", "columns"), [*WANTED, (False, False)], ids=["both", "rows", "columns", "scale"])
@EACH_INPUT
def test_the_kernels_give_the_same(make, rows: bool, columns: bool) -> None:
    x = make()
    assert_quantised(fp8_ops._cuda_quantise(x, rows, columns), x, rows, columns)


@on_the_cpu
def test_without_triton_the_formulas_serve(monkeypatch) -> None:
    monkeypatch.setattr(fp8_ops, "has_triton", lambda: False)
    monkeypatch.setitem(sys.modules, "semisparse.kernels", None)
    x = made(13, 32, torch.bfloat16)
    assert_quantised(fp8_ops._cuda_quantise(x, True, True), x, True, True)
    arguments = x, torch.tensor(0.5), torch.tensor(0.25), None, 13, torch.float16
    assert_bit_equal(fp8_ops._cuda_rescale(*arguments), ops.rescale(*arguments))


# ---- products and their scale


def codes_of(rows: int, columns: int) -> Tensor:
    """Small integers: every sum is exact."""
    return torch.randint(-4, 5, (rows, columns)).float().to(FP8)


@EACH_DTYPE
@pytest.mark.parametrize("sizes", [(16, 32, 48), (0, 32, 16), (16, 0, 16)], ids=str)
def test_the_dense_product_is_that_of_the_codes(sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    rows, reduction, columns = sizes
    a8, b8 = codes_of(rows, reduction), codes_of(columns, reduction)
    exact = a8.double() @ b8.double().mT
    assert_bit_equal(ops.fp8_dense_product(a8, b8, dtype), exact.to(dtype))
    scales = torch.tensor(0.25), torch.tensor(8.0)
    assert_bit_equal(ops.fp8_dense_product(a8, b8, dtype, *scales), (exact * 2).to(dtype))
    # Its test of the schema adds to the operands, which torch cannot do with e4m3.
    tests = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    for arguments in ((a8, b8, dtype), (a8, b8, dtype, *scales)):
        torch.library.opcheck(torch.ops.semisparse.fp8_dense_product.default, arguments, test_utils=tests)


def test_operands_that_do_not_fit_are_refused() -> None:
    a8, b8 = codes_of(16, 32), codes_of(16, 48)
    with pytest.raises(ShapeError, match="as many columns"):
        ops.fp8_dense_product(a8, b8, torch.bfloat16)
    for name, pair in (("a8", (a8.float(), b8)), ("b8", (a8, b8.mT))):
        with pytest.raises(TensorError, match=f"{name} is .*contiguous"):
            ops.fp8_dense_product(*pair, torch.bfloat16)
    one = torch.ones(())
    with pytest.raises(ShapeError, match=r"at least 17"):
        ops.rescale(torch.zeros(16, 32), one, one, None, 17, torch.float32)
    with pytest.raises(ShapeError, match=r"bias \(16,\)"):
        ops.rescale(torch.zeros(16, 32), one, one, torch.zeros(16), 16, torch.float32)
    with pytest.raises(ShapeError, match=r"bias \(16,\)"):
        ops.rescale_(torch.zeros(16, 32), one, one, torch.zeros(16))


@pytest.mark.filterwarnings("ignore:bf16 and fp16 are mixed")
@EACH_DTYPE
@pytest.mark.parametrize("given", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_rescale_rounds_once(given: torch.dtype, dtype: torch.dtype, with_bias: bool) -> None:
    y, bias = made(16, 48, given), torch.randn(48).to(dtype) if with_bias else None
    scales = torch.tensor(2.0**-3), torch.tensor(2.0**2)
    exact = y[:13].double() / 2 + (0 if bias is None else bias.double())
    expected = exact.float().to(dtype)  # the sum is rounded to fp32 first
    arguments = y, *scales, bias, 13, dtype
    for call in (ops.rescale, ops.rescale_formula, compiled_anew(ops.rescale_formula)):
        assert_bit_equal(call(*arguments), expected)
    if not torch.cuda.is_available():
        assert_bit_equal(fp8_ops._cuda_rescale(*arguments), expected)
    torch.library.opcheck(torch.ops.semisparse.rescale.default, arguments)


@EACH_DTYPE
def test_rescale_in_place_gives_the_numbers_of_rescale(dtype: torch.dtype) -> None:
    one, scale, bias = torch.ones(()), torch.tensor(2.0**-3), torch.randn(48)
    for y in (made(16, 48, dtype), made(48, 16, dtype).mT, made(16, 96, dtype)[:, ::2], made(0, 48, dtype)):
        for given in (None, bias, torch.randn(96)[::2]):
            for call in (ops.rescale_, fp8_ops._cuda_rescale_in_place)[: 1 + (not torch.cuda.is_available())]:
                written = y.clone()
                assert call(written, scale, one, given) is None
                assert_bit_equal(written, ops.rescale(y, scale, one, given, y.shape[0], dtype))
    torch.library.opcheck(torch.ops.semisparse.rescale_.default, (made(16, 48, dtype), scale, one, bias))


@on_the_cpu
def test_rescale_takes_whatever_the_kernel_does_not() -> None:
    one, y = torch.ones(()), made(16, 48, torch.float32)
    for given, rows in ((y.mT, 13), (y[:, ::2], 16), (y[:, :12], 16), (y, 0), (y[:, :0], 4)):
        arguments = given, one, one, None, rows, torch.bfloat16
        assert_bit_equal(fp8_ops._cuda_rescale(*arguments), ops.rescale(*arguments))
