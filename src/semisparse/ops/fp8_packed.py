"""Ops of weights that are pruned and packed in e4m3, and the forward of the fp8 linear layer.

e4m3 values travel as torch.float8_e4m3fn, packed buffers as uint8 in the 8-bit format of formats/layout.py. Scales are
fp32 numbers on the device; results without their scale are called sums. reference/linear.py has the equations.
"""

import torch
from torch import Tensor

from semisparse import calls, masks
from semisparse.config import Backend
from semisparse.errors import ShapeError
from semisparse.formats.layout import FP8, SM90_8BIT, SPARSE_MULTIPLE_8BIT, lengthened, packed_bytes
from semisparse.formats.packed import packed_format
from semisparse.gemm import problem
from semisparse.gemm.engine import engine
from semisparse.native.structures import LaunchKind, ProductKind
from semisparse.ops import prepare
from semisparse.ops.fp8 import fp8_dense_product, largest_of, quantise, rescale, rescale_, rescale_formula
from semisparse.ops.masks import _cuda_prune, checked
from semisparse.ops.packing import _cuda_unpack, _pack_in_steps
from semisparse.ops.products import multiply, padded
from semisparse.ops.register import plain_calls, register
from semisparse.reference import fp8 as reference
from semisparse.reference import masks as reference_masks
from semisparse.reference import packing as reference_packing


def _fake_pack_fp8(weight: Tensor, mask: str, codes: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = weight.shape
    sizes = packed_bytes(rows, columns, 1), packed_bytes(columns, rows, 1) if masks.get(mask).both_ways else 0
    packed, packed_t = (weight.new_empty(size, dtype=torch.uint8) for size in sizes)
    return packed, packed_t, weight.new_empty((), dtype=torch.float32)


def _checked(weight: Tensor, mask: str, codes: Tensor | None) -> masks.Mask:
    found = checked(weight, mask, codes, None)
    if any(size % SPARSE_MULTIPLE_8BIT for size in weight.shape):
        raise ShapeError(
            f"weight is {tuple(weight.shape)}; packing in fp8 needs multiples of {SPARSE_MULTIPLE_8BIT}: pad it"
        )
    return found


def _cuda_pack_fp8(weight: Tensor, mask: str, codes: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """By two kernels, or pruned and rounded in PyTorch and then packed."""
    found, weight = _checked(weight, mask, codes), weight.detach()
    written = packed_format(weight.get_device(), FP8, engine())
    if written.packer == "kernel" and written.layout is not None and found.chosen_while_packing:
        from semisparse.kernels import amax, prune_pack8

        read = amax.readable(weight)
        largest = largest_of(read, copied=read is not weight)
        packed, packed_t, scale = _fake_pack_fp8(read, mask, codes)
        rows, columns = weight.shape
        behind = (
            written.layout.pad_behind(packed, rows, columns, 1),
            written.layout.pad_behind(packed_t, columns, rows, 1),
        )
        into = packed, packed_t if found.both_ways else None
        launcher = prune_pack8.launch(read, largest, *into, layout=written.layout, mask=mask, codes=codes, scale=scale)
        if read is weight:
            prepare.launch(
                LaunchKind.PACK_FP8,
                launcher,
                (weight, codes, largest, scale, *into),
                dtypes=(weight.dtype, None),
                sizes=(*weight.shape, weight.stride(0)),
                mask=mask,
                given=(codes is not None, False),
                sizes_in_bytes=(packed.numel(), packed_t.numel()),
                behind=behind,
            )
        return packed, packed_t, scale
    _, _, scale = quantise(weight, False, False)
    rounded = reference.quantise(_cuda_prune(weight, weight.dtype, mask, codes), 1 / scale)
    return *_pack_in_steps(rounded, written, found, (True, found.both_ways)), scale


def encoded_fp8(codes: Tensor, kept: Tensor) -> Tensor:
    """The buffer, as long as an op's, of a matrix of e4m3 bytes (R x C) of which kept (bool) tells what stays."""
    rows, columns = codes.shape
    return lengthened(SM90_8BIT.encode(reference_packing.pack(codes, kept, torch.uint8)), rows, columns, 1)


@register(
    "pack_fp8(Tensor weight, str mask, Tensor? codes) -> (Tensor, Tensor, Tensor)",
    fake=_fake_pack_fp8,
    cuda=_cuda_pack_fp8,
    hot=True,
    note=calls.note,
)
def pack_fp8(weight: Tensor, mask: str, codes: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """A weight pruned, rounded to e4m3 and packed, and its transpose.

    Args:
        weight: N x K, multiples of 32, fp32, fp16 or bf16, any strides.
        mask: As SparseConfig's weight, but not "soft"; chosen before rounding.
        codes: As pack's.

    Returns:
        The buffers of W~ and of its transpose, which is empty for masks along K only, and the scale of both, a power of
        two that follows from the largest magnitude of the whole weight (reference/fp8.py).

    Raises:
        ShapeError, TensorError, ConfigError: As pack.
    """
    found = _checked(weight, mask, codes)
    kept = found.choose(weight) if codes is None else reference_masks.from_codes(codes)
    multiplier = reference.multiplier_for(reference.largest_magnitude(weight))
    rounded = reference.quantise(weight, multiplier).view(torch.uint8)
    packed = encoded_fp8(rounded, kept)
    packed_t = encoded_fp8(rounded.mT, kept.mT) if found.both_ways else packed.new_empty(0)
    return packed, packed_t, 1 / multiplier


def _fake_unpack_fp8(packed: Tensor, rows: int, columns: int) -> Tensor:
    return packed.new_empty(rows, columns, dtype=FP8)


def _cuda_unpack_fp8(packed: Tensor, rows: int, columns: int) -> Tensor:
    return _cuda_unpack(packed, rows, columns, FP8)


@register(
    "unpack_fp8(Tensor packed, SymInt rows, SymInt columns) -> Tensor",
    fake=_fake_unpack_fp8,
    cuda=_cuda_unpack_fp8,
    hot=True,
)
def unpack_fp8(packed: Tensor, rows: int, columns: int) -> Tensor:
    """The pruned matrix (rows x columns of e4m3, contiguous) that a buffer of pack_fp8 holds; exact."""
    return reference_packing.unpack(SM90_8BIT.decode(packed, rows, columns, torch.uint8)).view(FP8)


def _fake_fp8_product(
    x8: Tensor, packed: Tensor, out_features: int, backend: Backend, out_dtype: torch.dtype
) -> Tensor:
    return x8.new_empty(x8.shape[0], out_features, dtype=out_dtype)


def _cuda_fp8_product(
    x8: Tensor, packed: Tensor, out_features: int, backend: Backend, out_dtype: torch.dtype
) -> Tensor:
    tokens, in_features = x8.shape
    out = x8.new_empty(tokens, out_features, dtype=out_dtype)
    if tokens:
        asked = problem.fp8_forward(tokens, out_features, in_features, out_dtype)
        choice = multiply(asked, packed, padded(x8, tokens), out, None, backend)
        sizes = tokens, out_features, in_features
        prepare.product(ProductKind.FP8, asked, out.get_device(), sizes, choice, backend)
    return out


@register(
    "fp8_product(Tensor x8, Tensor packed, SymInt out_features, str backend, ScalarType out_dtype) -> Tensor",
    fake=_fake_fp8_product,
    cuda=_cuda_fp8_product,
    hot=True,
)
def fp8_product(x8: Tensor, packed: Tensor, out_features: int, backend: Backend, out_dtype: torch.dtype) -> Tensor:
    """The sums x8 A^T with A packed, without scale.

    Args:
        x8: M' x K, e4m3, contiguous, M' a multiple of 16.
        packed: A (out_features x K), as pack_fp8 gives it.
        out_features: Rows of A.
        backend: As SparseConfig's.
        out_dtype: bf16 or fp32; fp16 would overflow.

    Returns:
        M' x out_features; sums of fp32, rounded once.

    Raises:
        EngineError: On CUDA with backend "cusparselt", when no sparse algorithm is right for the problem.
    """
    return fp8_dense_product(x8, unpack_fp8(packed, out_features, x8.shape[1]), out_dtype)


def sums_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the sums of a call in dtype are rounded to: bf16 for bf16, else fp32, since fp16 would overflow."""
    return torch.bfloat16 if dtype is torch.bfloat16 else torch.float32


def rescaled(
    sums: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None, rows: int, dtype: torch.dtype
) -> Tensor:
    """rescale of sums that nothing else reads, so that eager calls write y into their memory where it fits there.

    In compiled code it is arithmetic that the compiler fuses into what follows. Dispatch modes may keep the sums, as
    selective checkpointing does, and transforms may wrap them: neither sees them change.
    """
    if torch.compiler.is_compiling():
        return rescale_formula(sums, scale_a, scale_b, bias, rows, dtype)
    if sums.dtype is dtype and sums.shape[0] == rows and type(sums) is Tensor and plain_calls():
        rescale_(sums, scale_a, scale_b, bias)
        return sums
    return rescale(sums, scale_a, scale_b, bias, rows, dtype)


def fp8_forward(
    tokens: int,
    out_features: int,
    bias: Tensor | None,
    x8: Tensor,
    scale_x: Tensor,
    w8: Tensor,
    scale_w: Tensor,
    mask: str | None,
    backend: Backend,
    dtype: torch.dtype,
) -> Tensor:
    """y = x8 W8^T * (scale_x * scale_w) + bias, (tokens, out_features) in dtype; operands as fp8_linear's."""
    if mask is None and bias is None:
        y = fp8_dense_product(x8, w8, dtype, scale_x, scale_w)
        # Not a view of the rows with padding: torch lets nothing write in place to a view that a function returns.
        return y if y.shape[0] == tokens else y[:tokens].clone()
    wide = sums_dtype(dtype)
    sums = fp8_dense_product(x8, w8, wide) if mask is None else fp8_product(x8, w8, out_features, backend, wide)
    return rescaled(sums, scale_x, scale_w, bias, tokens, dtype)


def _fake_fp8_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x8: Tensor,
    x8t: Tensor,
    scale_x: Tensor,
    w8: Tensor,
    w8t: Tensor,
    scale_w: Tensor,
    mask: str | None,
    backend: Backend,
    dtype: torch.dtype,
    grad_output: str | None = None,
    seed: Tensor | None = None,
) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0], dtype=dtype)


@register(
    "fp8_linear(Tensor x, Tensor weight, Tensor? bias, Tensor x8, Tensor x8t, Tensor scale_x, Tensor w8, Tensor w8t,"
    " Tensor scale_w, str? mask, str backend, ScalarType dtype, str? grad_output=None, Tensor? seed=None) -> Tensor",
    fake=_fake_fp8_linear,
    every_device=True,
    differentiable=True,
)
def fp8_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x8: Tensor,
    x8t: Tensor,
    scale_x: Tensor,
    w8: Tensor,
    w8t: Tensor,
    scale_w: Tensor,
    mask: str | None,
    backend: Backend,
    dtype: torch.dtype,
    grad_output: str | None = None,
    seed: Tensor | None = None,
) -> Tensor:
    """fp8_forward with a gradient formula, for exported graphs.

    Args:
        x: M x K. Only its number of tokens is read; it receives the gradient.
        weight: N x K. Its values are not read; it receives the gradient.
        bias: (N,) or None, fp32, fp16 or bf16.
        x8: x in e4m3, as quantise gives it with rows.
        x8t: The same with columns, for dW.
        scale_x: Scale of both.
        w8: The weight: packed by pack_fp8, or without a mask as quantise gives it with rows.
        w8t: Its transpose, for dx: the second buffer of pack_fp8, or as quantise gives it with columns.
        scale_w: Scale of both.
        mask: What the weight was pruned with; None if it was not.
        backend: As SparseConfig's.
        dtype: Of the call, and of y.
        grad_output: As SparseConfig's.
        seed: As semi_sparse_linear's; read in the backward.
    """
    return fp8_forward(x.shape[0], weight.shape[0], bias, x8, scale_x, w8, scale_w, mask, backend, dtype)
