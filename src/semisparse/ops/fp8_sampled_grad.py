"""The op of the sampled weight gradient in fp8: all that a backward does with dy, the product for dx aside.

Sampling costs a longer pass over dy, and the sparse product saves some of dW's time. With backend "auto" the autotuner
measures which of the two is more and, where sampling does not pay, dW is a dense fp8 product of all of dy: that of a
layer without grad_output, in place of a sample whose mean is dy^T x8.
"""

from functools import partial

import torch
from torch import Tensor

from semisparse.config import Backend
from semisparse.errors import ShapeError, TensorError
from semisparse.formats.layout import FP8, round_up
from semisparse.gemm import dispatch
from semisparse.gemm.weight_gradient import WeightGradient
from semisparse.ops import prepare
from semisparse.ops.fp8 import (
    MULTIPLE,
    _cuda_dense_product,
    _cuda_quantise,
    _cuda_rescale,
    _cuda_rescale_in_place,
    rescale_formula,
)
from semisparse.ops.fp8_packed import sums_dtype
from semisparse.ops.fp8_sampling import (
    _check_gradient,
    _cuda_fp8_sampled_product,
    _cuda_sample_fp8,
    fp8_sampled_product,
    sample_fp8,
)
from semisparse.ops.register import register
from semisparse.ops.sampling import _checked as checked_seed

_Gradients = tuple[Tensor, Tensor, Tensor, Tensor]


def _check_fit(grad_output: Tensor, x8t: Tensor, seed: Tensor | None) -> None:
    _check_gradient(grad_output)
    checked_seed(seed, grad_output)
    if x8t.dtype != FP8 or x8t.dim() != 2:
        raise TensorError(f"x8t is {x8t.dtype} {tuple(x8t.shape)}; it must be a matrix in {FP8}")
    tokens = round_up(grad_output.shape[0], MULTIPLE)
    if x8t.shape[1] != tokens:
        raise ShapeError(
            f"x8t has shape {tuple(x8t.shape)}, grad_output {tuple(grad_output.shape)}: x8t must have {tokens} columns"
        )


def _fake_fp8_sampled_grad_weight(
    grad_output: Tensor,
    x8t: Tensor,
    scale_x: Tensor,
    seed: Tensor | None,
    rows: bool,
    bias_dtype: torch.dtype | None,
    backend: Backend,
    dtype: torch.dtype,
) -> _Gradients:
    _check_fit(grad_output, x8t, seed)
    (tokens, out_features), in_features = grad_output.shape, x8t.shape[0]
    grad_weight = grad_output.new_empty(out_features, in_features, dtype=dtype)
    bias = grad_output.new_empty(0 if bias_dtype is None else out_features, dtype=bias_dtype)
    dy8 = grad_output.new_empty((round_up(tokens, MULTIPLE), out_features) if rows else (0,), dtype=FP8)
    return grad_weight, bias, dy8, grad_output.new_empty((), dtype=torch.float32)


def _sampled(
    grad_output: Tensor,
    x8t: Tensor,
    scale_x: Tensor,
    seed: Tensor | None,
    rows: bool,
    bias_dtype: torch.dtype | None,
    backend: Backend,
    dtype: torch.dtype,
) -> _Gradients:
    dy8, packed, bias, scale, scale_sample = _cuda_sample_fp8(grad_output, seed, rows, bias_dtype)
    out_features = grad_output.shape[1]
    sums = _cuda_fp8_sampled_product(packed, x8t, out_features, backend, sums_dtype(dtype))
    del packed
    if sums.dtype is dtype:
        _cuda_rescale_in_place(sums, scale_sample, scale_x, None)
    else:
        sums = _cuda_rescale(sums, scale_sample, scale_x, None, out_features, dtype)
    return sums, bias, dy8[: x8t.shape[1]], scale


def _whole(
    grad_output: Tensor, x8t: Tensor, scale_x: Tensor, rows: bool, bias_dtype: torch.dtype | None, dtype: torch.dtype
) -> _Gradients:
    dy8, dy8t, scale = _cuda_quantise(grad_output, rows, True)
    grad_weight = _cuda_dense_product(dy8t, x8t, dtype, scale, scale_x)
    bias = grad_output.new_empty(0) if bias_dtype is None else grad_output.sum(0, dtype=bias_dtype)
    return grad_weight, bias, dy8, scale


def _cuda_fp8_sampled_grad_weight(
    grad_output: Tensor,
    x8t: Tensor,
    scale_x: Tensor,
    seed: Tensor | None,
    rows: bool,
    bias_dtype: torch.dtype | None,
    backend: Backend,
    dtype: torch.dtype,
) -> _Gradients:
    _check_fit(grad_output, x8t, seed)
    grad_output = grad_output.detach()
    sampled = partial(_sampled, grad_output, x8t, scale_x, seed, rows, bias_dtype, backend, dtype)
    (tokens, out_features), index = grad_output.shape, grad_output.get_device()
    if backend != "auto" or not tokens:
        return sampled()
    sizes = tokens, out_features, x8t.shape[0]
    whole = partial(_whole, grad_output, x8t, scale_x, rows, bias_dtype, dtype)
    asked = WeightGradient(*sizes, grad_output.dtype, dtype, bias_dtype is not None)
    choice = dispatch.samples(asked, index, sampled, whole)
    prepare.way(asked, index, choice)
    return whole() if choice.algorithm is None else sampled()


@register(
    "fp8_sampled_grad_weight(Tensor grad_output, Tensor x8t, Tensor scale_x, Tensor? seed, bool rows,"
    " ScalarType? bias_dtype, str backend, ScalarType dtype) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_fp8_sampled_grad_weight,
    cuda=_cuda_fp8_sampled_grad_weight,
    hot=True,
)
def fp8_sampled_grad_weight(
    grad_output: Tensor,
    x8t: Tensor,
    scale_x: Tensor,
    seed: Tensor | None,
    rows: bool,
    bias_dtype: torch.dtype | None,
    backend: Backend,
    dtype: torch.dtype,
) -> _Gradients:
    """dW = S(dy)^T x8 or, on CUDA with backend "auto" where that measured faster, dy8^T x8; and the other uses of dy.

    Args:
        grad_output: dy, as sample_fp8's.
        x8t: x^T (K x M'), as quantise gives it with columns.
        scale_x: Its scale.
        seed: As sample_fp8's.
        rows: Whether dy in e4m3 is wanted.
        bias_dtype: As sample_fp8's.
        backend: As SparseConfig's. "cusparselt" and "dense" always sample, as does the CPU.
        dtype: Of dW.

    Returns:
        dW (N x K); the sum of dy over the tokens, or an empty tensor; dy in e4m3 (M' x N) and its scale, as quantise
        gives them with rows, or an empty tensor. M' is M rounded up to MULTIPLE.

    Raises:
        ShapeError, TensorError: grad_output and x8t do not fit together, or seed is not a key.
        EngineError: As fp8_sampled_product; and while a CUDA graph is captured, where nothing was chosen yet.
    """
    _check_fit(grad_output, x8t, seed)
    dy8, packed, bias, scale, scale_sample = sample_fp8(grad_output, seed, rows, bias_dtype)
    out_features = grad_output.shape[1]
    sums = fp8_sampled_product(packed, x8t, out_features, backend, sums_dtype(dtype))
    grad_weight = rescale_formula(sums, scale_sample, scale_x, None, out_features, dtype)
    return grad_weight, bias, dy8[: x8t.shape[1]], scale
