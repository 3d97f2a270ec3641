"""Ops of "mvue": the weight gradient dW = S(dy)^T x with S(dy) a random 2:4 sample of dy along tokens.

reference/mvue.py specifies the sample. seed is the key of its random numbers, one int64 element that ops only read;
None is the key 0.
"""

from typing import Any

import torch
from torch import Tensor

from semisparse.config import Backend
from semisparse.errors import ShapeError, TensorError
from semisparse.formats.layout import SPARSE_MULTIPLE, packed_bytes, round_up
from semisparse.formats.packed import packed_format
from semisparse.gemm import problem
from semisparse.gemm.engine import engine
from semisparse.native.structures import LaunchKind, ProductKind
from semisparse.ops import prepare
from semisparse.ops.masks import members
from semisparse.ops.packing import encoded, pack_pruned
from semisparse.ops.products import multiply, padded
from semisparse.ops.register import register
from semisparse.reference import mvue as reference


def _checked(seed: Tensor | None, grad_output: Tensor) -> Tensor | int:
    if seed is None:
        return 0
    if seed.dtype != torch.int64 or seed.dim() or seed.device != grad_output.device:
        raise TensorError(
            f"seed is {seed.dtype} {tuple(seed.shape)} on {seed.device}; it must be int64 without dimensions on "
            f"{grad_output.device}: start the schedule after moving the model, or pass None"
        )
    return seed


def _check_fit(grad_output: Tensor, x: Tensor) -> None:
    if x.dim() != 2 or x.shape[0] != grad_output.shape[0]:
        raise ShapeError(f"x has shape {tuple(x.shape)}; grad_output is {tuple(grad_output.shape)}, of the same tokens")
    if x.dtype != grad_output.dtype or x.device != grad_output.device:
        raise TensorError(
            f"x is {x.dtype} on {x.device}, grad_output {grad_output.dtype} on {grad_output.device}: convert one"
        )


def _fake_sample(grad_output: Tensor, seed: Tensor | None) -> Tensor:
    _checked(seed, grad_output)  # a seed on the meta device comes by here with a real gradient
    return torch.empty(grad_output.shape, dtype=grad_output.dtype, device=grad_output.device)


def _vmap_sample(
    info: Any, in_dims: tuple[int | None, ...], grad_output: Tensor, seed: Tensor | None
) -> tuple[Tensor, int]:
    size = info.batch_size
    pairs = zip(members(grad_output, in_dims[0], size), members(seed, in_dims[1], size), strict=True)
    return torch.stack([sample(one, key) for one, key in pairs]), 0  # type: ignore[arg-type]


@register("sample(Tensor grad_output, Tensor? seed) -> Tensor", fake=_fake_sample, every_device=True, vmap=_vmap_sample)
def sample(grad_output: Tensor, seed: Tensor | None) -> Tensor:
    """S(dy), contiguous, in dy's dtype; bit for bit as reference.mvue.sample, NaN's payload apart.

    Args:
        grad_output: dy (M x N), any M, N a multiple of 4, fp64, fp32, fp16 or bf16, any strides.
        seed: Key of the random numbers, or None.

    Raises:
        ShapeError, TensorError: dy has no groups of four columns, or seed is not such a key.
    """
    return reference.sample(grad_output.detach(), _checked(seed, grad_output)).matrix.contiguous()


def _fake_pack_sample(grad_output: Tensor, seed: Tensor | None, with_bias: bool) -> tuple[Tensor, Tensor]:
    _checked(seed, grad_output)
    tokens, out_features = grad_output.shape
    size = packed_bytes(out_features, round_up(tokens, SPARSE_MULTIPLE))
    return grad_output.new_empty(size, dtype=torch.uint8), grad_output.new_empty(out_features if with_bias else 0)


def _cuda_pack_sample(grad_output: Tensor, seed: Tensor | None, with_bias: bool) -> tuple[Tensor, Tensor]:
    """By the kernel or, where it cannot write the format, drawn by PyTorch and then packed as any matrix."""
    key = _checked(seed, grad_output)
    (tokens, out_features), index = grad_output.shape, grad_output.get_device()
    rows = round_up(tokens, SPARSE_MULTIPLE)
    written = packed_format(index, grad_output.dtype, engine())
    if written.packer != "kernel" or written.layout is None or tokens == 0:
        drawn = reference.sample(torch.nn.functional.pad(grad_output, (0, 0, 0, rows - tokens)), key).matrix
        bias = grad_output.sum(0) if with_bias else grad_output.new_empty(0)
        return pack_pruned(drawn.mT.contiguous(), written), bias
    from semisparse.kernels import bias as summing
    from semisparse.kernels import sample_pack as kernel

    packed = grad_output.new_empty(packed_bytes(out_features, rows), dtype=torch.uint8)
    behind = written.layout.pad_behind(packed, out_features, rows)
    shape = kernel.sum_rows(rows), out_features
    sums = grad_output.new_empty(shape, dtype=torch.float32) if with_bias else None
    sampler = kernel.launch(grad_output, seed, packed, sums, layout=written.layout, rows_padded=rows)
    bias = grad_output.new_empty(out_features if with_bias else 0)
    dtype = grad_output.dtype
    if prepare.repeatable(grad_output):
        prepare.launch(
            LaunchKind.SAMPLE,
            sampler,
            (grad_output, seed, packed, sums),
            dtypes=(dtype, dtype),
            sizes=(tokens, out_features, grad_output.stride(0)),
            given=(seed is not None, with_bias),
            sizes_in_bytes=(packed.numel(), 0 if sums is None else sums.nbytes),
            behind=(behind, 0),
        )
    if sums is not None:
        prepare.launch(
            LaunchKind.SUM_ROWS,
            summing.launch_sum(sums, bias),
            (sums, bias),
            dtypes=(sums.dtype, dtype),
            sizes=(*shape, 0),
        )
    return packed, bias


@register(
    "pack_sample(Tensor grad_output, Tensor? seed, bool with_bias) -> (Tensor, Tensor)",
    fake=_fake_pack_sample,
    cuda=_cuda_pack_sample,
)
def pack_sample(grad_output: Tensor, seed: Tensor | None, with_bias: bool) -> tuple[Tensor, Tensor]:
    """The packed transpose of S(dy), and the bias gradient, in one pass over dy on CUDA.

    Args:
        grad_output: dy (M x N), any M, N a multiple of 16, fp16 or bf16.
        seed: Key of the random numbers, or None.
        with_bias: Whether the bias gradient is wanted.

    Returns:
        The buffer of S(dy)^T (N x M', M' being M rounded up to a multiple of 16), in the engine's format; and the sum
        of dy over the tokens (N,), from fp32 sums on CUDA, or an empty tensor.
    """
    rows = round_up(grad_output.shape[0], SPARSE_MULTIPLE)
    whole = torch.nn.functional.pad(grad_output, (0, 0, 0, rows - grad_output.shape[0]))
    drawn = reference.sample(whole, _checked(seed, grad_output))
    bias = grad_output.sum(0) if with_bias else grad_output.new_empty(0)
    return encoded(drawn.matrix.mT, drawn.kept.mT, grad_output.dtype), bias


def _fake_sampled_grad_weight(
    grad_output: Tensor, x: Tensor, seed: Tensor | None, with_bias: bool, backend: Backend
) -> tuple[Tensor, Tensor]:
    _check_fit(grad_output, x)
    _checked(seed, grad_output)
    out_features = grad_output.shape[1]
    return x.new_empty(out_features, x.shape[1]), x.new_empty(out_features if with_bias else 0)


def _cuda_sampled_grad_weight(
    grad_output: Tensor, x: Tensor, seed: Tensor | None, with_bias: bool, backend: Backend
) -> tuple[Tensor, Tensor]:
    _check_fit(grad_output, x)
    (tokens, out_features), in_features = grad_output.shape, x.shape[1]
    if tokens == 0:
        return x.new_zeros(out_features, in_features), x.new_zeros(out_features if with_bias else 0)
    packed, bias = _cuda_pack_sample(grad_output, seed, with_bias)
    asked = problem.sampled_weight(tokens, out_features, in_features, x.dtype)
    out = x.new_empty(asked.d_shape)
    choice = multiply(asked, packed, padded(x, round_up(tokens, SPARSE_MULTIPLE)), out, None, backend)
    sizes = tokens, out_features, in_features
    prepare.product(ProductKind.SAMPLED, asked, out.get_device(), sizes, choice, backend)
    return out, bias


@register(
    "sampled_grad_weight(Tensor grad_output, Tensor x, Tensor? seed, bool with_bias, str backend) -> (Tensor, Tensor)",
    fake=_fake_sampled_grad_weight,
    cuda=_cuda_sampled_grad_weight,
    hot=True,
)
def sampled_grad_weight(
    grad_output: Tensor, x: Tensor, seed: Tensor | None, with_bias: bool, backend: Backend
) -> tuple[Tensor, Tensor]:
    """dW = S(dy)^T x (N x K), and the bias gradient.

    Args:
        grad_output: As pack_sample's.
        x: M x K, of dy's dtype, K a multiple of 8.
        seed: As pack_sample's.
        with_bias: As pack_sample's.
        backend: As SparseConfig's.

    Returns:
        dW, which errs as torch's own product does, given S(dy); and the bias gradient as pack_sample gives it.

    Raises:
        ShapeError, TensorError: grad_output and x do not fit together, or seed is not a key.
        EngineError: On CUDA with backend "cusparselt", when no sparse algorithm is right for the problem.
    """
    _check_fit(grad_output, x)
    drawn = reference.sample(grad_output, _checked(seed, grad_output)).matrix
    return drawn.mT @ x, grad_output.sum(0) if with_bias else grad_output.new_empty(0)


def _fake_sampled_linear(x: Tensor, weight: Tensor, bias: Tensor | None, seed: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@register(
    "sampled_linear(Tensor x, Tensor weight, Tensor? bias, Tensor? seed) -> Tensor",
    fake=_fake_sampled_linear,
    every_device=True,
    differentiable=True,
)
def sampled_linear(x: Tensor, weight: Tensor, bias: Tensor | None, seed: Tensor | None) -> Tensor:
    """F.linear with the gradient formula dW = S(dy)^T x, for the masked dense route.

    Args:
        x: (..., K).
        weight: N x K, pruned already, of x's dtype; N a multiple of 4.
        bias: (N,), of x's dtype, or None.
        seed: As sample's.

    Returns:
        (..., N).
    """
    return torch.nn.functional.linear(x, weight, bias)
