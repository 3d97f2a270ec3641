"""The custom ops: registration, fake implementations, and agreement with the specification."""

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from semisparse import ops
from semisparse.errors import ConfigError, ShapeError, TensorError
from semisparse.reference import masks
from semisparse.testing import DTYPES, assert_bit_equal
from tests.support import brute_mask, brute_token_mask

pytestmark = pytest.mark.usefixtures("poison")

MATRICES = {
    "square": lambda: torch.randn(16, 16),
    "wide_bf16": lambda: torch.randn(8, 36).bfloat16(),
    "transposed": lambda: torch.randn(12, 8).mT,
    "strided": lambda: torch.randn(16, 24)[::2, ::2],
    "expanded": lambda: torch.randn(1, 8).expand(4, 8),
    "empty": lambda: torch.randn(0, 8),
    "no_columns": lambda: torch.randn(8, 0),
    "needs_grad": lambda: torch.randn(8, 8, requires_grad=True),
}
TOKENS = {
    "none": lambda: torch.randn(0, 8),
    "one": lambda: torch.randn(1, 8),
    "partial_tile": lambda: torch.randn(6, 12),
    "whole_tiles": lambda: torch.randn(8, 12).half(),
    "transposed": lambda: torch.randn(12, 7).mT,
    "needs_grad": lambda: torch.randn(5, 8, requires_grad=True),
}
PRUNE, PRUNE_TOKENS = torch.ops.semisparse.prune.default, torch.ops.semisparse.prune_tokens.default
ARGUMENTS = [
    *(
        (PRUNE, make, (dtype, mask))
        for make in MATRICES.values()
        for dtype, mask in [(torch.float32, "transposable"), (torch.bfloat16, "row")]
    ),
    *((PRUNE_TOKENS, make, (dtype,)) for make in TOKENS.values() for dtype in (torch.float32, torch.float16)),
]
IDS = [
    f"{op.name()}-{name}-{rest}"
    for op, table, settings in [
        (PRUNE, MATRICES, ["transposable", "bf16-row"]),
        (PRUNE_TOKENS, TOKENS, ["fp32", "fp16"]),
    ]
    for name in table
    for rest in settings
]


@pytest.mark.filterwarnings("ignore:.*is non-deterministic.*")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # read by torch 2.15's opcheck
@pytest.mark.parametrize(("op", "make", "rest"), ARGUMENTS, ids=IDS)
def test_opcheck(op: torch._ops.OpOverload, make, rest) -> None:
    torch.library.opcheck(op, (make(), *rest))


@pytest.mark.parametrize(("op", "make", "rest"), ARGUMENTS, ids=IDS)
def test_fake_and_meta_agree_with_the_real_result(op: torch._ops.OpOverload, make, rest) -> None:
    matrix = make()
    real = op(matrix, *rest)
    mode = FakeTensorMode()
    with mode:
        fake = op(mode.from_tensor(matrix), *rest)
    meta = op(matrix.to("meta"), *rest)
    for other in (fake, meta):
        assert (other.shape, other.dtype, other.stride()) == (real.shape, real.dtype, real.stride())
    assert fake.device == matrix.device
    assert meta.device.type == "meta"
    assert real.is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
def test_prune_chooses_before_rounding_and_rounds_once(dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    matrix = torch.randn(24, 36).to(dtype)
    expected = torch.where(brute_mask(matrix), matrix, 0).to(out_dtype)
    assert_bit_equal(ops.prune(matrix, out_dtype, "transposable"), expected)
    expected = torch.where(masks.row(matrix), matrix, 0).to(out_dtype)
    assert_bit_equal(ops.prune(matrix, out_dtype, "row"), expected)


@pytest.mark.parametrize("tokens", range(10))
def test_prune_tokens_counts_zero_rows_after_the_last(tokens: int) -> None:
    x = torch.randn(tokens, 12)
    assert_bit_equal(ops.prune_tokens(x, torch.float32), torch.where(brute_token_mask(x), x, 0))


def test_masks_come_from_fp32_where_bf16_would_tie() -> None:
    matrix = 1 + torch.rand(16, 16) * 2.0**-10  # one value in bf16
    pruned = ops.prune(matrix, torch.bfloat16, "transposable")
    assert torch.equal(pruned != 0, brute_mask(matrix))
    assert not torch.equal(pruned != 0, brute_mask(matrix.bfloat16()))


def test_results_never_alias_an_input() -> None:
    matrix = torch.zeros(4, 4)
    for result in (ops.prune(matrix, torch.float32, "row"), ops.prune_tokens(matrix, torch.float32)):
        result.fill_(1)
        assert not matrix.any()


def test_non_finite_entries_do_not_spread() -> None:
    matrix = torch.ones(4, 4)
    matrix[0] = torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0])
    pruned = ops.prune(matrix, torch.float32, "row")
    assert_bit_equal(pruned[0], torch.tensor([float("nan"), float("inf"), 0.0, 0.0]))


def bad_calls() -> dict[str, tuple[type[Exception], Tensor, str]]:
    return {
        "1-d": (ShapeError, torch.ones(8), "transposable"),
        "columns": (ShapeError, torch.ones(8, 6), "transposable"),
        "rows": (ShapeError, torch.ones(6, 8), "transposable"),
        "row_columns": (ShapeError, torch.ones(8, 6), "row"),
        "integers": (TensorError, torch.ones(8, 8, dtype=torch.int64), "transposable"),
        "mask": (ConfigError, torch.ones(8, 8), "sideways"),
    }


@pytest.mark.parametrize("case", bad_calls())
def test_bad_calls_raise_typed_errors_through_the_dispatcher(case: str) -> None:
    error, matrix, mask = bad_calls()[case]
    with pytest.raises(error):
        ops.prune(matrix, torch.float32, mask)


def test_tokens_need_features_in_fours_and_a_float_dtype() -> None:
    with pytest.raises(ShapeError, match="multiple of 4"):
        ops.prune_tokens(torch.ones(4, 6), torch.float32)
    with pytest.raises(TensorError, match="int64"):
        ops.prune_tokens(torch.ones(4, 8, dtype=torch.int64), torch.float32)


def test_pruning_passes_the_gradient_straight_through_in_the_dtype_of_the_matrix() -> None:
    matrix = torch.randn(8, 8, requires_grad=True)
    for pruned in (ops.prune(matrix, torch.bfloat16, "transposable"), ops.prune_tokens(matrix, torch.bfloat16)):
        grad_output = torch.randn(8, 8).bfloat16()
        (gradient,) = torch.autograd.grad(pruned, matrix, grad_output)
        assert_bit_equal(gradient, grad_output.float())


def test_products_by_themselves_have_no_gradient() -> None:
    """As on a GPU, where autograd sees nothing of them; packed_linear is the op with a formula."""
    x = torch.randn(4, 16, dtype=torch.bfloat16, requires_grad=True)
    packed, _ = ops.pack(torch.randn(32, 16), torch.bfloat16, "transposable")
    assert not ops.packed_matmul(x, packed, None, 32, "auto").requires_grad


@pytest.mark.parametrize(("matrix", "dtype", "error"), [
    (torch.ones(16, 16), torch.float32, TensorError),
    (torch.ones(16, 20), torch.bfloat16, ShapeError),
    (torch.ones(8, 16), torch.bfloat16, ShapeError),
])  # fmt: skip
def test_what_a_gpu_cannot_pack_is_not_packed_on_the_cpu(matrix: Tensor, dtype: torch.dtype, error: type) -> None:
    for pack in (ops.pack, ops.pack_transpose):
        with pytest.raises(error):
            pack(matrix, dtype, "transposable")
