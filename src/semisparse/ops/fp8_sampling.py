"""Ops of "mvue" in fp8: dW = S(dy)^T x with the sample and x in e4m3, and dy in e4m3 for dx, in one pass over dy.

reference/mvue_fp8.py specifies the sample. seed is as in ops/sampling.py. Tokens are padded to a multiple of 32, since
they are the sparse axis of the product.
"""

import torch
from torch import Tensor

from semisparse.config import Backend
from semisparse.errors import ShapeError, TensorError
from semisparse.formats.layout import FP8, SPARSE_MULTIPLE_8BIT, packed_bytes, round_up
from semisparse.formats.packed import packed_format
from semisparse.gemm import problem
from semisparse.gemm.engine import engine
from semisparse.native.structures import LaunchKind, ProductKind
from semisparse.ops import prepare
from semisparse.ops.fp8 import fp8_dense_product, largest_of, quantise
from semisparse.ops.fp8_packed import encoded_fp8, unpack_fp8
from semisparse.ops.packing import pack_pruned
from semisparse.ops.products import multiply, padded
from semisparse.ops.register import register
from semisparse.ops.sampling import _checked as checked_seed
from semisparse.reference import mvue_fp8 as reference

_Sampled = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _check_gradient(grad_output: Tensor) -> None:
    if grad_output.dim() != 2 or grad_output.shape[1] % SPARSE_MULTIPLE_8BIT:
        raise ShapeError(
            f"grad_output has shape {tuple(grad_output.shape)}; it must be M x N with N a multiple of "
            f"{SPARSE_MULTIPLE_8BIT}"
        )
    if grad_output.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TensorError(f"grad_output is {grad_output.dtype}; fp8 takes float32, float16 or bfloat16")


def _fake_sample_fp8(grad_output: Tensor, seed: Tensor | None, rows: bool, bias_dtype: torch.dtype | None) -> _Sampled:
    _check_gradient(grad_output)
    checked_seed(seed, grad_output)
    out_features, tokens = grad_output.shape[1], round_up(grad_output.shape[0], SPARSE_MULTIPLE_8BIT)
    dy8 = grad_output.new_empty((tokens, out_features) if rows else (0,), dtype=FP8)
    packed = grad_output.new_empty(packed_bytes(out_features, tokens, 1), dtype=torch.uint8)
    bias = grad_output.new_empty(0 if bias_dtype is None else out_features, dtype=bias_dtype)
    scale, scale_sample = (grad_output.new_empty((), dtype=torch.float32) for _ in range(2))
    return dy8, packed, bias, scale, scale_sample


def _cuda_sample_fp8(grad_output: Tensor, seed: Tensor | None, rows: bool, bias_dtype: torch.dtype | None) -> _Sampled:
    """By two kernels or, where they cannot write the format, drawn by PyTorch and then packed as any matrix."""
    _check_gradient(grad_output)
    key = checked_seed(seed, grad_output)
    written = packed_format(grad_output.get_device(), FP8, engine())
    if written.packer != "kernel" or written.layout is None or not grad_output.numel():
        drawn, dy8, bias, scale, scale_sample = _in_steps(grad_output, key, rows, bias_dtype)
        turned = drawn.codes.mT.contiguous()
        packed = pack_pruned(turned.view(FP8), written) if turned.numel() else turned.flatten()
        return dy8, packed, bias, scale, scale_sample
    from semisparse.kernels import amax
    from semisparse.kernels import bias as summing
    from semisparse.kernels import sample_pack8 as kernel

    dy8, packed, bias, scale, scale_sample = _fake_sample_fp8(grad_output, seed, rows, bias_dtype)
    tokens, out_features = grad_output.shape
    behind = written.layout.pad_behind(packed, out_features, round_up(tokens, SPARSE_MULTIPLE_8BIT), 1)
    gradient = amax.readable(grad_output)
    largest = largest_of(gradient, copied=gradient is not grad_output)
    shape = kernel.sum_rows(gradient.shape[0]), gradient.shape[1]
    sums = None if bias_dtype is None else gradient.new_empty(shape, dtype=torch.float32)
    given = gradient, seed, largest, dy8 if rows else None, packed, sums
    sampler = kernel.launch(*given, (scale, scale_sample), layout=written.layout)
    if gradient is grad_output:
        prepare.launch(
            LaunchKind.SAMPLE_FP8,
            sampler,
            (*given, scale, scale_sample),
            dtypes=(gradient.dtype, FP8 if rows else None),
            sizes=(*gradient.shape, gradient.stride(0)),
            given=(seed is not None, sums is not None),
            sizes_in_bytes=(packed.numel(), 0 if sums is None else sums.nbytes),
            behind=(behind, 0),
        )
    if sums is not None:
        adder = summing.launch_sum(sums, bias)
        kinds = sums.dtype, bias.dtype
        prepare.launch(LaunchKind.SUM_ROWS, adder, (sums, bias), dtypes=kinds, sizes=(*shape, 0))
    return dy8, packed, bias, scale, scale_sample


def _in_steps(
    grad_output: Tensor, key: Tensor | int, rows: bool, bias_dtype: torch.dtype | None
) -> tuple[reference.QuantisedSample, Tensor, Tensor, Tensor, Tensor]:
    """The sample of the padded gradient; then the other results of sample_fp8."""
    missing = -grad_output.shape[0] % SPARSE_MULTIPLE_8BIT
    drawn = reference.sample(torch.nn.functional.pad(grad_output, (0, 0, 0, missing)), key)
    dy8, _, scale = quantise(grad_output, rows, False)
    if rows:
        dy8 = _pad(dy8, (0, 0, 0, drawn.codes.shape[0] - dy8.shape[0]))
    bias = grad_output.new_empty(0) if bias_dtype is None else grad_output.sum(0, dtype=bias_dtype)
    return drawn, dy8, bias, scale, drawn.scale


def _pad(matrix: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Zeros added to an e4m3 matrix, if any; as bytes, because not every version of torch pads the dtype."""
    if not any(sizes):  # where pad would copy
        return matrix
    return torch.nn.functional.pad(matrix.view(torch.uint8), sizes).view(FP8)


@register(
    "sample_fp8(Tensor grad_output, Tensor? seed, bool rows, ScalarType? bias_dtype)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_sample_fp8,
    cuda=_cuda_sample_fp8,
    hot=True,
)
def sample_fp8(grad_output: Tensor, seed: Tensor | None, rows: bool, bias_dtype: torch.dtype | None) -> _Sampled:
    """dy and the packed transpose of S(dy) in e4m3, and the bias gradient; on CUDA in one pass after amax.

    Args:
        grad_output: dy (M x N), any M, N a multiple of 32, fp32, fp16 or bf16, any strides.
        seed: Key of the random numbers, or None.
        rows: Whether dy itself is wanted.
        bias_dtype: Of the bias gradient; None if that is not wanted.

    Returns:
        dy in e4m3 (M' x N, M' being M rounded up to a multiple of 32, zeros in the padding), as quantise rounds it, or
        an empty tensor; the buffer of S(dy)^T (N x M'); the sum of dy over the tokens (N,), from fp32 sums on CUDA, or
        an empty tensor; the scale of dy, and that of the sample, which is twice as large.

    Raises:
        ShapeError, TensorError: grad_output is not such a matrix, or seed is not a key.
    """
    _check_gradient(grad_output)
    drawn, dy8, bias, scale, scale_sample = _in_steps(grad_output, checked_seed(seed, grad_output), rows, bias_dtype)
    packed = encoded_fp8(drawn.codes.mT, drawn.kept.mT)
    return dy8, packed, bias, scale, scale_sample


def _check_packed(packed: Tensor, x8t: Tensor, out_features: int) -> int:
    """The number of tokens, padded to a multiple of 32."""
    if x8t.dtype != FP8 or x8t.dim() != 2:
        raise TensorError(f"x8t is {x8t.dtype} {tuple(x8t.shape)}; it must be a matrix in {FP8}")
    tokens = round_up(x8t.shape[1], SPARSE_MULTIPLE_8BIT)
    if packed.numel() != packed_bytes(out_features, tokens, 1):
        raise ShapeError(
            f"packed has {packed.numel()} bytes; {out_features} x {tokens}, for x8t of shape {tuple(x8t.shape)}, takes "
            f"{packed_bytes(out_features, tokens, 1)}"
        )
    return tokens


def _fake_fp8_sampled_product(
    packed: Tensor, x8t: Tensor, out_features: int, backend: Backend, out_dtype: torch.dtype
) -> Tensor:
    return x8t.new_empty(out_features, x8t.shape[0], dtype=out_dtype)


def _cuda_fp8_sampled_product(
    packed: Tensor, x8t: Tensor, out_features: int, backend: Backend, out_dtype: torch.dtype
) -> Tensor:
    tokens, in_features = _check_packed(packed, x8t, out_features), x8t.shape[0]
    if tokens == 0:
        return x8t.new_zeros(out_features, in_features, dtype=out_dtype)
    asked = problem.fp8_sampled_weight(tokens, out_features, in_features, out_dtype)
    out = x8t.new_empty(asked.d_shape, dtype=out_dtype)
    wide = _pad(x8t, (0, tokens - x8t.shape[1]))
    choice = multiply(asked, packed, padded(wide, in_features), out, None, backend)
    if wide is x8t:
        sizes = tokens, out_features, in_features
        prepare.product(ProductKind.FP8_SAMPLED, asked, out.get_device(), sizes, choice, backend)
    return out


@register(
    "fp8_sampled_product(Tensor packed, Tensor x8t, SymInt out_features, str backend, ScalarType out_dtype) -> Tensor",
    fake=_fake_fp8_sampled_product,
    cuda=_cuda_fp8_sampled_product,
    hot=True,
)
def fp8_sampled_product(
    packed: Tensor, x8t: Tensor, out_features: int, backend: Backend, out_dtype: torch.dtype
) -> Tensor:
    """The sums S(dy)^T x, without scale.

    Args:
        packed: S(dy)^T (N x M'), as sample_fp8 gives it.
        x8t: x^T (K x M in e4m3), as quantise gives it with columns. Where M is not a multiple of 32, zeros are added,
            which copies it.
        out_features: N.
        backend: As SparseConfig's.
        out_dtype: bf16 or fp32; fp16 would overflow.

    Returns:
        N x K; sums of fp32, rounded once.

    Raises:
        ShapeError, TensorError: The operands do not fit together.
        EngineError: On CUDA with backend "cusparselt", when no sparse algorithm is right for the problem.
    """
    tokens = _check_packed(packed, x8t, out_features)
    wide = _pad(x8t, (0, tokens - x8t.shape[1]))
    return fp8_dense_product(unpack_fp8(packed, out_features, tokens), wide, out_dtype)
