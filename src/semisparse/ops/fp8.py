"""Ops of fp8: a tensor as e4m3 in both orders with its scale, dense products of such, and the scale of a product.

reference/fp8.py specifies the rounding. Where the code around them is compiled, quantise_formula and rescale_formula
are the same in plain PyTorch, so that inductor fuses them with their neighbours.
"""

import torch
from torch import Tensor

from semisparse import calls
from semisparse.errors import ShapeError, TensorError
from semisparse.formats.layout import FP8, round_up
from semisparse.native.structures import DTYPE_CODES, LaunchKind
from semisparse.ops import prepare
from semisparse.ops.masks import has_triton
from semisparse.ops.register import register
from semisparse.reference import fp8 as reference

MULTIPLE = 16
"""Rows of a quantised matrix are padded to a multiple of this, which products want, and its columns must be one."""

_INFINITE = 255 << 23  # bits of an fp32 number


def _check_matrix(x: Tensor) -> None:
    if x.dim() != 2 or x.shape[1] % MULTIPLE:
        raise ShapeError(f"x has shape {tuple(x.shape)}; it must be M x K with K a multiple of {MULTIPLE}")
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TensorError(f"x is {x.dtype}; fp8 takes float32, float16 or bfloat16")


def _fake_quantise(x: Tensor, rows: bool, columns: bool) -> tuple[Tensor, Tensor, Tensor]:
    _check_matrix(x)
    tokens, features = round_up(x.shape[0], MULTIPLE), x.shape[1]
    x8 = x.new_empty((tokens, features) if rows else (0,), dtype=FP8)
    x8t = x.new_empty((features, tokens) if columns else (0,), dtype=FP8)
    return x8, x8t, x.new_empty((), dtype=torch.float32)


def _cuda_quantise(x: Tensor, rows: bool, columns: bool) -> tuple[Tensor, Tensor, Tensor]:
    """By two kernels: one for the largest magnitude, one that writes."""
    if not has_triton():
        return quantise_formula(x, rows, columns)
    from semisparse.kernels import amax
    from semisparse.kernels import quantise as kernel

    x8, x8t, scale = _fake_quantise(x, rows, columns)
    if not x.numel():
        return x8, x8t, scale.fill_(1)
    read = amax.readable(x)
    largest = largest_of(read, copied=read is not x)
    if not (rows or columns):
        amax.launch_scale(largest, scale)
        return x8, x8t, scale
    given = x8 if rows else None, x8t if columns else None
    launcher = kernel.launch(read, largest, *given, scale)
    if read is x:
        prepare.launch(
            LaunchKind.QUANTISE,
            launcher,
            (x, largest, *given, scale),
            dtypes=(x.dtype, None),
            sizes=(*x.shape, x.stride(0)),
            given=(rows, columns),
            sizes_in_bytes=(x8.numel(), x8t.numel()),
        )
    return x8, x8t, scale


def largest_of(matrix: Tensor, *, copied: bool) -> Tensor:
    """The largest magnitudes of a matrix, as kernels.amax leaves them.

    Args:
        matrix: On CUDA, not empty, as amax.readable gives it.
        copied: Whether it is a copy, which a native call does not make.
    """
    from semisparse.kernels import amax

    largest = matrix.new_empty(amax.programs_for(matrix), dtype=torch.int32)
    launcher = amax.launch(matrix, largest)
    if not copied:
        prepare.launch(
            LaunchKind.LARGEST,
            launcher,
            (matrix, largest),
            dtypes=(matrix.dtype, None),
            sizes=(*matrix.shape, matrix.stride(0)),
            sizes_in_bytes=(largest.nbytes, 0),
        )
    return largest


@register(
    "quantise(Tensor x, bool rows, bool columns) -> (Tensor, Tensor, Tensor)",
    fake=_fake_quantise,
    cuda=_cuda_quantise,
    hot=True,
    note=calls.note,
)
def quantise(x: Tensor, rows: bool, columns: bool) -> tuple[Tensor, Tensor, Tensor]:
    """x as e4m3 with one scale: x is about x8 * scale. Bit for bit as reference/fp8.py.

    Args:
        x: M x K, fp32, fp16 or bf16, any strides, K a multiple of MULTIPLE.
        rows: Whether x8 is wanted.
        columns: Whether x8t is wanted.

    Returns:
        x8 (M' x K) and x8t (K x M', its transpose), e4m3 and contiguous, M' being M rounded up to MULTIPLE with zeros
        in the padding; what is not wanted is empty, of shape (0,). Then scale, fp32 without dimensions: a power of two,
        NaN if x is not finite.

    Raises:
        ShapeError, TensorError: x is not such a matrix.
    """
    _check_matrix(x)
    multiplier = reference.multiplier_for(reference.largest_magnitude(x))
    # As bytes: not every op of every version of torch knows the dtype.
    codes = reference.quantise(x, multiplier).view(torch.uint8)
    codes = torch.nn.functional.pad(codes, (0, 0, 0, -x.shape[0] % MULTIPLE))
    x8 = codes.view(FP8) if rows else x.new_empty(0, dtype=FP8)
    x8t = codes.mT.clone(memory_format=torch.contiguous_format).view(FP8) if columns else x.new_empty(0, dtype=FP8)
    return x8, x8t, multiplier.reciprocal()


def quantise_formula(x: Tensor, rows: bool, columns: bool) -> tuple[Tensor, Tensor, Tensor]:
    """quantise, bit for bit, as plain operations of PyTorch, which inductor fuses with what is before and behind them.

    Args:
        x: As quantise's.
        rows: As quantise's.
        columns: As quantise's.

    Raises:
        ShapeError, TensorError: As quantise.
    """
    _check_matrix(x)
    largest = x.abs().amax().float() if x.numel() else x.new_zeros((), dtype=torch.float32)
    # The bits of 448 / largest, rounded down to a power of two: 448 is 1.75 * 2^8, and a mantissa above 1.75 carries.
    bits = (largest.view(torch.int32) & 0x7FFFFFFF).clamp(max=_INFINITE)  # a NaN may have come out with a sign
    exponent = (127 + 8 + 127 - (bits + 0x1FFFFF >> 23)).clamp(max=127 + reference.LARGEST_EXPONENT)
    exponent = torch.where(bits == 0, 127, exponent)
    finite = bits < _INFINITE
    multiplier = torch.where(finite, (exponent << 23).view(torch.float32), torch.nan)
    scale = torch.where(finite, (2 * 127 - exponent << 23).view(torch.float32), torch.nan)
    scaled = torch.nn.functional.pad(x.float() * multiplier, (0, 0, 0, -x.shape[0] % MULTIPLE))
    clamped = scaled.clamp(-reference.LARGEST, reference.LARGEST)  # NaN stays
    codes = torch.where(clamped.isnan(), torch.nan, clamped).to(FP8)  # without the sign of a NaN
    x8 = codes if rows else x.new_empty(0, dtype=FP8)
    x8t = codes.mT.clone(memory_format=torch.contiguous_format) if columns else x.new_empty(0, dtype=FP8)
    return x8, x8t, scale


def _check_product(a8: Tensor, b8: Tensor) -> None:
    for name, matrix in (("a8", a8), ("b8", b8)):
        if matrix.dtype != FP8 or matrix.dim() != 2 or not matrix.is_contiguous():
            raise TensorError(f"{name} is {matrix.dtype} {tuple(matrix.shape)}; it must be a contiguous {FP8} matrix")
    if a8.shape[1] != b8.shape[1]:
        raise ShapeError(f"a8 has shape {tuple(a8.shape)}, b8 {tuple(b8.shape)}; both must have as many columns")


def _fake_dense_product(
    a8: Tensor, b8: Tensor, out_dtype: torch.dtype, scale_a: Tensor | None = None, scale_b: Tensor | None = None
) -> Tensor:
    _check_product(a8, b8)
    return a8.new_empty(a8.shape[0], b8.shape[0], dtype=out_dtype)


def _cuda_dense_product(
    a8: Tensor, b8: Tensor, out_dtype: torch.dtype, scale_a: Tensor | None = None, scale_b: Tensor | None = None
) -> Tensor:
    """By cuBLASLt, which refuses sizes of 0."""
    _check_product(a8, b8)
    if not (a8.numel() and b8.numel()):
        return a8.new_zeros(a8.shape[0], b8.shape[0], dtype=out_dtype)
    if scale_a is None or scale_b is None:
        one = a8.new_ones((), dtype=torch.float32)
        scale_a, scale_b = one if scale_a is None else scale_a, one if scale_b is None else scale_b
    # Fast accumulation would sum with fewer bits than fp32 has.
    return torch._scaled_mm(a8, b8.mT, scale_a, scale_b, out_dtype=out_dtype, use_fast_accum=False)


@register(
    "fp8_dense_product(Tensor a8, Tensor b8, ScalarType out_dtype, Tensor? scale_a=None, Tensor? scale_b=None)"
    " -> Tensor",
    fake=_fake_dense_product,
    cuda=_cuda_dense_product,
    hot=True,
)
def fp8_dense_product(
    a8: Tensor, b8: Tensor, out_dtype: torch.dtype, scale_a: Tensor | None = None, scale_b: Tensor | None = None
) -> Tensor:
    """a8 b8^T of e4m3 matrices, summed in fp32 and rounded once.

    Args:
        a8: R x C, contiguous; R, C and S multiples of MULTIPLE on CUDA.
        b8: S x C, contiguous.
        out_dtype: fp32, fp16 or bf16.
        scale_a: Multiplies the product before it is rounded: one fp32 number on the device; None for 1.
        scale_b: The same again.

    Returns:
        R x S.

    Raises:
        ShapeError, TensorError: a8 and b8 are not such matrices.
    """
    _check_product(a8, b8)
    a, b = (reference.decode(codes.view(torch.uint8)) for codes in (a8, b8))
    product = a @ b.mT
    for scale in (scale_a, scale_b):
        product = product if scale is None else product * scale
    return product.to(out_dtype)


def _check_rescaled(y: Tensor, bias: Tensor | None, rows: int) -> None:
    if y.dim() != 2 or y.shape[0] < rows or (bias is not None and bias.shape != y.shape[1:]):
        shape = None if bias is None else tuple(bias.shape)
        raise ShapeError(f"y has shape {tuple(y.shape)}, bias {shape}; they must be (at least {rows}, N) and (N,)")


def _fake_rescale(
    y: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None, rows: int, dtype: torch.dtype
) -> Tensor:
    return y.new_empty(rows, y.shape[1], dtype=dtype)


def rescale_formula(
    y: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None, rows: int, dtype: torch.dtype
) -> Tensor:
    """rescale as plain operations of PyTorch, which inductor fuses with what is before and behind them.

    Nothing is converted to the dtype that it has: torch.compile of torch 2.11 would make two outputs of one tensor from
    that, and give the gradient of the result to the other one.

    Args:
        y: As rescale's.
        scale_a: As rescale's.
        scale_b: As rescale's.
        bias: As rescale's.
        rows: As rescale's.
        dtype: As rescale's.
    """
    scaled = _as(y[:rows], torch.float32) * (scale_a * scale_b)
    return _as(scaled if bias is None else scaled + _as(bias, torch.float32), dtype)


def _as(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype is dtype else x.to(dtype)


def _by_kernel(y: Tensor, rows: int) -> bool:
    columns = y.shape[1]
    return bool(rows and columns) and columns % MULTIPLE == 0 and y.is_contiguous() and has_triton()


def _cuda_rescale(
    y: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None, rows: int, dtype: torch.dtype
) -> Tensor:
    _check_rescaled(y, bias, rows)
    if not _by_kernel(y, rows):
        return rescale_formula(y, scale_a, scale_b, bias, rows, dtype)
    out = _fake_rescale(y, scale_a, scale_b, bias, rows, dtype)
    _launch_rescale(y, scale_a, scale_b, bias, out)
    return out


def _launch_rescale(y: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None, out: Tensor) -> None:
    from semisparse.kernels import rescale as kernel

    bias = None if bias is None else bias.contiguous()
    prepare.launch(
        LaunchKind.RESCALE,
        kernel.launch(y, scale_a, scale_b, bias, out),
        (y, scale_a, scale_b, bias, out),
        dtypes=(y.dtype, out.dtype),
        sizes=(*out.shape, 0 if bias is None else DTYPE_CODES[bias.dtype]),
        given=(bias is not None, False),
    )


@register(
    "rescale(Tensor y, Tensor scale_a, Tensor scale_b, Tensor? bias, SymInt rows, ScalarType dtype) -> Tensor",
    fake=_fake_rescale,
    cuda=_cuda_rescale,
    hot=True,
)
def rescale(y: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None, rows: int, dtype: torch.dtype) -> Tensor:
    """y * (scale_a * scale_b) + bias in fp32, rounded once: the product of two tensors from that of their codes.

    Args:
        y: M' x N, contiguous, fp32, fp16 or bf16.
        scale_a: fp32 without dimensions.
        scale_b: fp32 without dimensions.
        bias: (N,), fp32, fp16 or bf16, or None.
        rows: How many rows of y are wanted.
        dtype: Of the result: fp32, fp16 or bf16.

    Returns:
        rows x N, contiguous.

    Raises:
        ShapeError: y has fewer rows, or bias another size.
    """
    _check_rescaled(y, bias, rows)
    return rescale_formula(y, scale_a, scale_b, bias, rows, dtype)


def _fake_rescale_in_place(y: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None) -> None:
    _check_rescaled(y, bias, y.shape[0])


def _cuda_rescale_in_place(y: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None) -> None:
    _check_rescaled(y, bias, y.shape[0])
    if _by_kernel(y, y.shape[0]):
        _launch_rescale(y, scale_a, scale_b, bias, y)
    else:
        y.copy_(rescale_formula(y, scale_a, scale_b, bias, y.shape[0], y.dtype))


@register(
    "rescale_(Tensor(a!) y, Tensor scale_a, Tensor scale_b, Tensor? bias) -> ()",
    fake=_fake_rescale_in_place,
    cuda=_cuda_rescale_in_place,
    hot=True,
)
def rescale_(y: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None) -> None:
    """rescale of all rows into y itself, which saves the memory of a result. The only op that writes to an operand.

    Args:
        y: As rescale's; overwritten.
        scale_a: As rescale's.
        scale_b: As rescale's.
        bias: As rescale's.

    Raises:
        ShapeError: As rescale.
    """
    _check_rescaled(y, bias, y.shape[0])
    y.copy_(rescale_formula(y, scale_a, scale_b, bias, y.shape[0], y.dtype))
