"""The two functions against autograd of masked-dense F.linear, over the shape grid, and their errors."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from semisparse.errors import ConfigError, EngineError, SemiSparseError, ShapeError, TensorError
from semisparse.functional import compute_dtype, semi_sparse_activation_linear, semi_sparse_linear
from semisparse.nn import SemiSparseActivationLinear, SemiSparseLinear
from semisparse.reference import masks
from semisparse.testing import DTYPES, LINEAR_SHAPES, assert_as_good_as_torch, assert_bit_equal, small_integers
from tests.support import Result, masked_dense

pytestmark = pytest.mark.usefixtures("poison")

FUNCTIONS = {SemiSparseLinear: semi_sparse_linear, SemiSparseActivationLinear: semi_sparse_activation_linear}
CLASSES = pytest.mark.parametrize("layer_class", FUNCTIONS, ids=lambda cls: cls.operand)
SHAPES = pytest.mark.parametrize(("m", "k", "n"), LINEAR_SHAPES)
ALL_DTYPES = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def evaluate(
    function: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None, grad_output: Tensor
) -> Result:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (x, weight, bias) if tensor is not None]
    output = function(*leaves)
    grads = torch.autograd.grad(output, leaves, grad_output)
    return Result(output.detach(), grads[0], grads[1], grads[2] if bias is not None else None)


@CLASSES
@SHAPES
@ALL_DTYPES
def test_whole_numbers_give_the_same_bits(layer_class: type, m: int, k: int, n: int, dtype: torch.dtype) -> None:
    x, weight, bias, grad = (
        small_integers(shape, seed=seed, dtype=dtype) for seed, shape in enumerate([(m, k), (n, k), (n,), (m, n)])
    )
    for used_bias in (bias, None):
        ours = evaluate(FUNCTIONS[layer_class], x, weight, used_bias, grad)
        bias64 = None if used_bias is None else used_bias.double()
        exact = masked_dense(layer_class, x.double(), weight.double(), bias64, grad.double())
        for result, expected in zip(ours, exact, strict=True):
            if expected is not None:
                assert_bit_equal(result + 0, expected.to(dtype) + 0)  # + 0: the sign of a zero sum is not specified


@CLASSES
@SHAPES
@ALL_DTYPES
def test_random_numbers_err_no_more_than_twice_as_much_as_torch(
    layer_class: type, m: int, k: int, n: int, dtype: torch.dtype
) -> None:
    x, weight, bias, grad = (torch.randn(shape).to(dtype) for shape in [(m, k), (n, k), (n,), (m, n)])
    ours = evaluate(FUNCTIONS[layer_class], x, weight, bias, grad)
    same = masked_dense(layer_class, x, weight, bias, grad)
    exact = masked_dense(layer_class, x.double(), weight.double(), bias.double(), grad.double())
    for triple in zip(ours, same, exact, strict=True):
        assert_as_good_as_torch(*triple)


def test_the_row_mask_prunes_along_k_only() -> None:
    x, weight = small_integers((5, 16), seed=1), torch.randn(8, 16)
    pruned = torch.where(masks.row(weight), weight, 0)
    assert_bit_equal(semi_sparse_linear(x, weight, mask="row"), x @ pruned.mT)
    assert not torch.equal(masks.row(weight), masks.transposable(weight))


@pytest.mark.parametrize("function", FUNCTIONS.values())
def test_the_dense_engine_is_the_same_function_and_cusparselt_needs_a_gpu(function: Callable[..., Tensor]) -> None:
    x, weight = torch.randn(4, 16), torch.randn(16, 16)
    assert_bit_equal(function(x, weight, backend="dense"), function(x, weight, backend="auto"))
    with pytest.raises(EngineError, match=r"backend='cusparselt' needs a CUDA weight.*use backend='auto'"):
        function(x, weight, backend="cusparselt")


BAD_OPERANDS = {
    "weight_1d": (ShapeError, "weight", lambda: (torch.ones(4, 8), torch.ones(8), None)),
    "weight_n": (ShapeError, "weight", lambda: (torch.ones(4, 8), torch.ones(6, 8), None)),
    "weight_k": (ShapeError, "weight", lambda: (torch.ones(4, 6), torch.ones(8, 6), None)),
    "x_features": (ShapeError, "input", lambda: (torch.ones(4, 12), torch.ones(8, 8), None)),
    "x_scalar": (ShapeError, "input", lambda: (torch.ones(()), torch.ones(8, 8), None)),
    "bias_size": (ShapeError, "bias", lambda: (torch.ones(4, 8), torch.ones(8, 8), torch.ones(4))),
    "bias_2d": (ShapeError, "bias", lambda: (torch.ones(4, 8), torch.ones(8, 8), torch.ones(8, 1))),
    "x_dtype": (TensorError, "input", lambda: (torch.ones(4, 8).half(), torch.ones(8, 8), None)),
    "bias_dtype": (TensorError, "bias", lambda: (torch.ones(4, 8), torch.ones(8, 8), torch.ones(8).double())),
    "x_integers": (TensorError, "input", lambda: (torch.ones(4, 8).long(), torch.ones(8, 8), None)),
    "weight_complex": (TensorError, "weight", lambda: (torch.ones(4, 8), torch.ones(8, 8) + 1j, None)),
    "x_device": (TensorError, "input", lambda: (torch.ones(4, 8, device="meta"), torch.ones(8, 8), None)),
    "bias_device": (TensorError, "bias", lambda: (torch.ones(4, 8), torch.ones(8, 8), torch.ones(8, device="meta"))),
}


@pytest.mark.parametrize("function", FUNCTIONS.values())
@pytest.mark.parametrize("case", BAD_OPERANDS)
def test_bad_operands_raise_a_typed_error_that_names_them(case: str, function: Callable[..., Tensor]) -> None:
    error, name, make = BAD_OPERANDS[case]
    x, weight, bias = make()
    with pytest.raises(error, match=rf"^{name} ") as caught:
        function(x, weight, bias)
    assert isinstance(caught.value, (SemiSparseError, ValueError))


@pytest.mark.parametrize("function", FUNCTIONS.values())
@pytest.mark.parametrize("place", range(3))
def test_fp64_does_not_mix_with_other_dtypes_under_autocast(function: Callable[..., Tensor], place: int) -> None:
    operands = [torch.ones(4, 8), torch.ones(8, 8), torch.ones(8)]
    operands[place] = operands[place].double()
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TensorError, match="float64"):
        function(*operands)


def test_compute_dtype_is_the_weights_unless_autocast_applies() -> None:
    x, weight = torch.ones(4, 8), torch.ones(8, 8)
    assert compute_dtype(x, weight) == torch.float32
    assert compute_dtype(x.half(), weight.half()) == torch.float16
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            assert compute_dtype(x, weight) == dtype
            assert compute_dtype(x.bfloat16(), weight) == dtype
            assert compute_dtype(x.double(), weight.double()) == torch.float64


def test_an_unknown_backend_is_named_on_every_device() -> None:
    with pytest.raises(ConfigError, match="backend='fast' is not one of 'auto', 'cusparselt', 'dense'"):
        semi_sparse_linear(torch.ones(4, 16), torch.ones(16, 16), backend="fast")  # type: ignore[arg-type]


@pytest.mark.parametrize("mask", ["transposable", "row", None])
@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"backend": "fast"}, "backend='fast' is not one of"),
        ({"repack": True}, "precision='fp8' does not work together with repack=True"),
    ],
    ids=str,
)
def test_in_fp8_what_no_product_takes_is_named_for_a_pruned_and_a_whole_weight(
    mask: str | None, given: dict[str, object], said: str
) -> None:
    x, weight = torch.ones(4, 32), torch.ones(32, 32)
    with pytest.raises(ConfigError, match=said):
        semi_sparse_linear(x, weight, mask=mask, precision="fp8", **given)  # type: ignore[arg-type]


def test_a_whole_weight_has_no_sparse_product_to_ask_for() -> None:
    with pytest.raises(ConfigError, match="no sparse product to compute with mask=None"):
        semi_sparse_linear(torch.ones(4, 32), torch.ones(32, 32), mask=None, precision="fp8", backend="cusparselt")
