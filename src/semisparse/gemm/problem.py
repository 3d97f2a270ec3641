"""Description of one sparse product D = A B + bias: sizes, dtype and storage, without tensors.

A (rows x reduction) is the 2:4 operand, packed along its columns; B (reduction x columns) and D (rows x columns) are
dense. Both may be stored row by row or column by column. A column-major matrix is handled everywhere as the row-major
tensor of its transpose: x (M x K, contiguous), as PyTorch holds it, is B = x^T in column order.

The five products of the library (M tokens, K in_features, N out_features, W~ and x~ the pruned operands, S(dy) the
sampled gradient):

    function             product                 A            B                     D
    forward              y  = x W~^T + b         W~   (N, K)  x^T (K, M) from x     y^T  (N, M) stored as y
    grad_input           dx = dy W~              W~^T (K, N)  dy^T (N, M) from dy   dx^T (K, M) stored as dx
    activation_forward   y  = x~ W^T             x~   (M, K)  W^T (K, N) from W     y    (M, N)
    activation_weight    dW = dy^T x~            x~^T (K, M)  dy  (M, N)            dW^T (K, N) stored as dW
    sampled_weight       dW = S(dy)^T x          S(dy)^T (N, M)  x  (M, K)         dW   (N, K)

The bias is one value per row of D, so only `forward` can add it in the engine's epilogue.

`fp8_forward` and `fp8_grad_input` are the first two with float8_e4m3fn operands, `fp8_sampled_weight` is the last one,
with x^T (K, M) as the tensor that holds B. Such products are without scale: what the codes stand for is multiplied, the
sums go into bf16 or fp32, and scales and bias follow in a pass of their own.
"""

from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Literal

import torch

from semisparse.errors import ConfigError, ShapeError, TensorError
from semisparse.formats.layout import FP8, PACKED_DTYPES, SPARSE_MULTIPLE, round_up, sparse_multiple

Order = Literal["row", "column"]
Axis = Literal["rows", "reduction", "columns"]

DENSE_MULTIPLE = 8
"""Columns of the dense operand must be a multiple of this (16-bit types; measured on cuSPARSELt 0.8.0)."""

DENSE_MULTIPLE_8BIT = 16
"""The same for 8-bit types."""

FP8_OUT_DTYPES = (torch.bfloat16, torch.float32)
"""Dtypes of D for float8_e4m3fn operands. Sums without scale may be beyond fp16's range."""

BUCKET_BITS = 3
"""Significant bits of a token count that a bucket keeps: neighbouring buckets differ by at most a quarter."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One product D = A B (+ bias), A 2:4 sparse. Immutable and hashable; the hash is computed once.

    Attributes:
        rows: Of A and D.
        reduction: Columns of A, rows of B.
        columns: Of B and D.
        dtype: Of A, B and bias; float16, bfloat16 or float8_e4m3fn. Sums are kept in fp32 and rounded once.
        b_order: Storage order of B, "row" or "column".
        d_order: Storage order of D.
        bias: Whether one value per row of D is added before rounding.
        token_axis: Which of the three sizes counts tokens, and so changes from step to step.
        out_dtype: Of D. Default: dtype, the only one for 16-bit operands; one of FP8_OUT_DTYPES for float8_e4m3fn.

    Raises:
        ShapeError: A size is below 1.
        TensorError: A dtype is another one.
        ConfigError: An order or the axis is another one, or a bias is asked of float8_e4m3fn operands.
    """

    rows: int
    reduction: int
    columns: int
    dtype: torch.dtype
    b_order: Order = "column"
    d_order: Order = "column"
    bias: bool = False
    token_axis: Axis = "columns"
    out_dtype: torch.dtype = None  # type: ignore[assignment]  # __post_init__ replaces None
    _hash: int = field(init=False, repr=False, compare=False, default=0)

    def __post_init__(self) -> None:
        for name in ("rows", "reduction", "columns"):
            size = getattr(self, name)
            if type(size) is not int or size < 1:
                raise ShapeError(f"{name}={size!r} must be an int of at least 1; return early for an empty product")
        if self.dtype not in (*PACKED_DTYPES, FP8):
            raise TensorError(f"dtype={self.dtype} has no 2:4 product here; use float16, bfloat16 or float8_e4m3fn")
        if self.out_dtype is None:
            object.__setattr__(self, "out_dtype", self.dtype)
        possible = FP8_OUT_DTYPES if self.dtype is FP8 else (self.dtype,)
        if self.out_dtype not in possible:
            names = " or ".join(str(dtype) for dtype in possible)
            raise TensorError(f"out_dtype={self.out_dtype} is no result of {self.dtype} operands; use {names}")
        if self.bias and self.dtype is FP8:
            raise ConfigError(f"bias=True, but products of {FP8} are without scale; add it after scaling")
        for name in ("b_order", "d_order"):
            if getattr(self, name) not in ("row", "column"):
                raise ConfigError(f"{name}={getattr(self, name)!r} is not one of 'row', 'column'")
        if self.token_axis not in ("rows", "reduction", "columns"):
            raise ConfigError(f"token_axis={self.token_axis!r} is not one of 'rows', 'reduction', 'columns'")
        fields = (self.rows, self.reduction, self.columns, self.dtype, self.b_order, self.d_order, self.bias)
        object.__setattr__(self, "_hash", hash((*fields, self.token_axis, self.out_dtype)))

    def __hash__(self) -> int:
        # Look-ups happen on every call; hashing nine fields each time would cost more than the look-up.
        return self._hash

    def __reduce__(self) -> tuple[type["Problem"], tuple[object, ...]]:
        # Rebuilt rather than copied: the stored hash holds only in the process that computed it.
        orders = (self.b_order, self.d_order, self.bias, self.token_axis)
        return Problem, (self.rows, self.reduction, self.columns, self.dtype, *orders, self.out_dtype)

    @property
    def b_shape(self) -> tuple[int, int]:
        """Shape of the contiguous tensor that holds B: B itself, or its transpose when B is column-major."""
        size = (self.reduction, self.columns)
        return size if self.b_order == "row" else size[::-1]

    @property
    def d_shape(self) -> tuple[int, int]:
        """Shape of the contiguous tensor that holds D: D itself, or its transpose when D is column-major."""
        size = (self.rows, self.columns)
        return size if self.d_order == "row" else size[::-1]

    @property
    def tokens(self) -> int:
        """Tokens of this product, padding included."""
        return int(getattr(self, self.token_axis))

    @property
    def bucket(self) -> "Problem":
        """The problem whose tuning result this one shares: tokens rounded up to a bucket, N and K exact."""
        size = {"rows": self.rows, "reduction": self.reduction, "columns": self.columns}
        size[self.token_axis] = bucket_of(self.tokens)
        return replace(self, rows=size["rows"], reduction=size["reduction"], columns=size["columns"])

    def key(self) -> dict[str, object]:
        """The fields as JSON values, as stored choices name them."""
        # Named only where it is not the operands', so that keys of earlier versions stay what they are.
        out = {} if self.out_dtype is self.dtype else {"out_dtype": _name_of(self.out_dtype)}
        return {
            "dtype": _name_of(self.dtype),
            **out,
            "b_order": self.b_order,
            "d_order": self.d_order,
            "bias": self.bias,
            "token_axis": self.token_axis,
            "rows": self.rows,
            "reduction": self.reduction,
            "columns": self.columns,
        }

    def refusal(self) -> str | None:
        """Why the sparse engine cannot take sizes or storage, or None where it can.

        Masked dense takes all of them, except that its float8_e4m3fn products need multiples of 16 on CUDA.
        """
        sparse = sparse_multiple(self.dtype)
        limits = {"rows": sparse, "reduction": sparse, "columns": dense_multiple(self.dtype)}
        wrong = [
            f"{name}={getattr(self, name)} is not a multiple of {limit}"
            for name, limit in limits.items()
            if getattr(self, name) % limit
        ]
        if self.dtype is FP8 and self.b_order != "column":
            wrong.append(f"b_order={self.b_order!r} is not 'column', as 8-bit types need it")
        return ", ".join(wrong) or None

    def __str__(self) -> str:
        bias = " + bias" if self.bias else ""
        out = "" if self.out_dtype is self.dtype else f" -> {_name_of(self.out_dtype)}"
        return (
            f"{self.rows}x{self.reduction} (2:4) times {self.reduction}x{self.columns} ({self.b_order}-major) "
            f"into {self.d_order}-major{bias}, {_name_of(self.dtype)}{out}"
        )


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def dense_multiple(dtype: torch.dtype) -> int:
    """What the columns of a dense operand of a dtype must be a multiple of."""
    return DENSE_MULTIPLE_8BIT if dtype.itemsize == 1 else DENSE_MULTIPLE


def bucket_of(tokens: int) -> int:
    """tokens (at least 1) rounded up to BUCKET_BITS significant bits: 13008 -> 14336, 16384 -> 16384."""
    return round_up(tokens, 1 << max(0, tokens.bit_length() - BUCKET_BITS))


# The constructors are cached, so that a repeated call returns the identical object: look-ups then compare no fields.
# The bound covers 1,000 token counts of each product; past it objects are only built again.
_CACHED = 4096


@lru_cache(_CACHED)
def forward(tokens: int, out_features: int, in_features: int, dtype: torch.dtype, bias: bool = False) -> Problem:
    """y = x W~^T + b with A = W~ (N x K).

    Args:
        tokens: M. The problem has M rounded up to a multiple of 8 as columns; the caller pads x and y.
        out_features: N.
        in_features: K.
        dtype: Of all operands.
        bias: Whether b is added.
    """
    return Problem(out_features, in_features, round_up(tokens, DENSE_MULTIPLE), dtype, bias=bias)


@lru_cache(_CACHED)
def grad_input(tokens: int, out_features: int, in_features: int, dtype: torch.dtype) -> Problem:
    """dx = dy W~ with A = W~^T (K x N).

    Args:
        tokens: M. The problem has M rounded up to a multiple of 8 as columns; the caller pads dy and dx.
        out_features: N.
        in_features: K.
        dtype: Of all operands.
    """
    return Problem(in_features, out_features, round_up(tokens, DENSE_MULTIPLE), dtype)


@lru_cache(_CACHED)
def activation_forward(tokens: int, out_features: int, in_features: int, dtype: torch.dtype) -> Problem:
    """y = x~ W^T with A = x~ (M x K); D is y itself, row-major.

    Without a bias: the engine's has one value per row of D, which is a token here. Add it afterwards.

    Args:
        tokens: M. The problem has M rounded up to a multiple of 16 as rows.
        out_features: N.
        in_features: K.
        dtype: Of all operands.
    """
    return Problem(
        round_up(tokens, SPARSE_MULTIPLE), in_features, out_features, dtype, "column", "row", token_axis="rows"
    )


@lru_cache(_CACHED)
def activation_weight(tokens: int, out_features: int, in_features: int, dtype: torch.dtype) -> Problem:
    """dW = dy^T x~, computed as dW^T = x~^T dy with A = x~^T (K x M); D is stored as dW, row-major N x K.

    Args:
        tokens: M. The problem has M rounded up to a multiple of 16 as reduction; pad dy with zero rows.
        out_features: N.
        in_features: K.
        dtype: Of all operands.
    """
    reduction = round_up(tokens, SPARSE_MULTIPLE)
    return Problem(in_features, reduction, out_features, dtype, "row", "column", token_axis="reduction")


@lru_cache(_CACHED)
def sampled_weight(tokens: int, out_features: int, in_features: int, dtype: torch.dtype) -> Problem:
    """dW = S(dy)^T x with A = S(dy)^T (N x M), 2:4 along tokens; D is dW itself, row-major.

    Args:
        tokens: M. The problem has M rounded up to a multiple of 16 as reduction; pad x with zero rows.
        out_features: N.
        in_features: K.
        dtype: Of all operands.
    """
    reduction = round_up(tokens, SPARSE_MULTIPLE)
    return Problem(out_features, reduction, in_features, dtype, "row", "row", token_axis="reduction")


@lru_cache(_CACHED)
def fp8_forward(tokens: int, out_features: int, in_features: int, out_dtype: torch.dtype) -> Problem:
    """y = x8 W8~^T without scale, with A = W8~ (N x K), of float8_e4m3fn.

    Args:
        tokens: M. The problem has M rounded up to a multiple of 16 as columns; the caller pads x8 and y.
        out_features: N.
        in_features: K.
        out_dtype: Of y, one of FP8_OUT_DTYPES.
    """
    columns = round_up(tokens, DENSE_MULTIPLE_8BIT)
    return Problem(out_features, in_features, columns, FP8, out_dtype=out_dtype)


@lru_cache(_CACHED)
def fp8_grad_input(tokens: int, out_features: int, in_features: int, out_dtype: torch.dtype) -> Problem:
    """dx = dy8 W8~ without scale, with A = W8~^T (K x N), of float8_e4m3fn.

    Args:
        tokens: M. The problem has M rounded up to a multiple of 16 as columns; the caller pads dy8 and dx.
        out_features: N.
        in_features: K.
        out_dtype: Of dx, one of FP8_OUT_DTYPES.
    """
    columns = round_up(tokens, DENSE_MULTIPLE_8BIT)
    return Problem(in_features, out_features, columns, FP8, out_dtype=out_dtype)


@lru_cache(_CACHED)
def fp8_sampled_weight(tokens: int, out_features: int, in_features: int, out_dtype: torch.dtype) -> Problem:
    """dW = S(dy8)^T x8 without scale, with A = S(dy8)^T (N x M), of float8_e4m3fn; D is dW itself, row-major.

    Args:
        tokens: M. The problem has M rounded up to a multiple of 32 as reduction; pad x8^T with columns of zeros.
        out_features: N.
        in_features: K.
        out_dtype: Of dW, one of FP8_OUT_DTYPES.
    """
    reduction = round_up(tokens, sparse_multiple(FP8))
    return Problem(
        out_features, reduction, in_features, FP8, "column", "row", token_axis="reduction", out_dtype=out_dtype
    )
