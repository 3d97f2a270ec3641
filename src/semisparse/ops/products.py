"""Ops that multiply with a packed operand: on CUDA the engine's products, on the CPU masked dense ones.

The hot ops (packed_matmul, pack_linear, packed_tokens_matmul, packed_tokens_grad_weight) know nothing of gradients.
Exported graphs hold packed_linear and packed_tokens_linear, which take every operand that has a gradient, so that
autograd.py can register their formulas.
"""

import torch
from torch import Tensor

from semisparse import calls, masks
from semisparse.config import Backend
from semisparse.formats.layout import ALIGNMENT, SPARSE_MULTIPLE, round_up
from semisparse.formats.packed import packed_format
from semisparse.gemm import dispatch, problem
from semisparse.gemm.autotune.algorithm import Choice
from semisparse.gemm.engine import engine
from semisparse.gemm.operands import Operands
from semisparse.gemm.problem import DENSE_MULTIPLE, Problem
from semisparse.native.structures import LaunchKind, ProductKind
from semisparse.operands import as_tokens
from semisparse.ops import prepare
from semisparse.ops.packing import _cuda_pack, _cuda_unpack, _fake_pack, pack, unpack
from semisparse.ops.register import register


def _fake_packed_matmul(x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, backend: Backend) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


def _cuda_packed_matmul(x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, backend: Backend) -> Tensor:
    """Tokens are padded to what the engine takes, and cut off again."""
    shape, matrix = (*x.shape[:-1], out_features), as_tokens(x)
    tokens, in_features = matrix.shape
    if tokens == 0:
        return x.new_empty(shape)
    asked = problem.forward(tokens, out_features, in_features, x.dtype, bias is not None)
    matrix = padded(matrix, round_up(tokens, DENSE_MULTIPLE))
    out = matrix.new_empty(matrix.shape[0], out_features)
    choice = multiply(asked, packed, matrix, out, None if bias is None else _aligned(bias), backend)
    sizes = tokens, out_features, in_features
    prepare.product(ProductKind.WEIGHT, asked, out.get_device(), sizes, choice, backend)
    return out.resize_(shape)  # not a view: autograd refuses writes to views made where it does not look


@register(
    "packed_matmul(Tensor x, Tensor packed, Tensor? bias, SymInt out_features, str backend) -> Tensor",
    fake=_fake_packed_matmul,
    cuda=_cuda_packed_matmul,
    hot=True,
)
def packed_matmul(x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, backend: Backend) -> Tensor:
    """x A^T + bias with A packed.

    Args:
        x: (..., K), of the packed dtype.
        packed: A (out_features x K), as pack gives it.
        bias: (out_features,), of the packed dtype, or None.
        out_features: Rows of A.
        backend: As SparseConfig's.

    Returns:
        (..., out_features); errs as torch's own product in that dtype does.

    Raises:
        EngineError: On CUDA with backend "cusparselt", when no sparse algorithm is right for the problem.
    """
    return torch.nn.functional.linear(x, unpack(packed, out_features, x.shape[-1], x.dtype), bias)


def _fake_pack_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: str,
    codes: Tensor | None,
    scale: Tensor | None,
    backend: Backend,
) -> tuple[Tensor, Tensor]:
    packed, packed_t = _fake_pack(weight, x.dtype, mask, codes, scale)
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    return y, packed_t if masks.get(mask).both_ways else packed


def _cuda_pack_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: str,
    codes: Tensor | None,
    scale: Tensor | None,
    backend: Backend,
) -> tuple[Tensor, Tensor]:
    calls.note(weight)
    packed, packed_t = _cuda_pack(weight, x.dtype, mask, codes, scale)
    y = _cuda_packed_matmul(x, packed, bias, weight.shape[0], backend)
    return y, packed_t if masks.get(mask).both_ways else packed


@register(
    "pack_linear(Tensor x, Tensor weight, Tensor? bias, str mask, Tensor? codes, Tensor? scale, str backend)"
    " -> (Tensor, Tensor)",
    fake=_fake_pack_linear,
    cuda=_cuda_pack_linear,
    hot=True,
)
def pack_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: str,
    codes: Tensor | None,
    scale: Tensor | None,
    backend: Backend,
) -> tuple[Tensor, Tensor]:
    """pack and packed_matmul in one call, which costs the host less: y = x W~^T + b, and what dx = dy W~ needs.

    Args:
        x: (..., K), fp16 or bf16.
        weight: As pack's matrix (N x K).
        bias: (N,), of x's dtype, or None.
        mask: As pack's.
        codes: As pack's.
        scale: As pack's.
        backend: As SparseConfig's.

    Returns:
        y, (..., N), and the packed buffer of W~^T or, for masks along K only, of W~.

    Raises:
        ShapeError, TensorError, ConfigError: As pack.
        EngineError: As pack and packed_matmul.
    """
    calls.note(weight)
    packed, packed_t = pack(weight, x.dtype, mask, codes, scale)
    y = packed_matmul(x, packed, bias, weight.shape[0], backend)
    return y, packed_t if masks.get(mask).both_ways else packed


def _fake_packed_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    packed: Tensor,
    packed_t: Tensor,
    mask: str,
    backend: Backend,
    grad_output: str | None = None,
    seed: Tensor | None = None,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@register(
    "packed_linear(Tensor x, Tensor weight, Tensor? bias, Tensor packed, Tensor packed_t, str mask, str backend,"
    " str? grad_output=None, Tensor? seed=None) -> Tensor",
    fake=_fake_packed_linear,
    every_device=True,
    differentiable=True,
)
def packed_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    packed: Tensor,
    packed_t: Tensor,
    mask: str,
    backend: Backend,
    grad_output: str | None = None,
    seed: Tensor | None = None,
) -> Tensor:
    """packed_matmul with a gradient formula: y = x W~^T + b, for exported graphs.

    Args:
        x: (..., K), of the packed dtype.
        weight: N x K, the dense master weight. Only its shape is read; it receives the gradient dy^T x.
        bias: (N,), of the packed dtype, or None.
        packed: W~, as pack gives it for weight.
        packed_t: Its transpose, for dx = dy W~; empty where mask has none.
        mask: As SparseConfig's weight.
        backend: As SparseConfig's.
        grad_output: As SparseConfig's: how dy is pruned in dW.
        seed: Key of the random numbers of grad_output="mvue", or None.
    """
    return packed_matmul(x, packed, bias, weight.shape[0], backend)


def _fake_packed_tokens_matmul(
    packed: Tensor, weight: Tensor, bias: Tensor | None, tokens: int, backend: Backend
) -> Tensor:
    return weight.new_empty(tokens, weight.shape[0])


def _cuda_packed_tokens_matmul(
    packed: Tensor, weight: Tensor, bias: Tensor | None, tokens: int, backend: Backend
) -> Tensor:
    """The engine adds no bias along these rows: our kernel does or, without triton, PyTorch."""
    out_features, in_features = weight.shape
    if tokens == 0:
        return weight.new_empty(0, out_features)
    asked = problem.activation_forward(tokens, out_features, in_features, weight.dtype)
    out = weight.new_empty(asked.d_shape)
    choice = multiply(asked, packed, padded(weight, out_features), out, None, backend)
    sizes = tokens, out_features, in_features
    prepare.product(ProductKind.TOKENS, asked, out.get_device(), sizes, choice, backend)
    out = out.resize_(tokens, out_features)
    if bias is not None and packed_format(out.get_device(), out.dtype, engine()).packer == "kernel":
        from semisparse.kernels import bias as kernel

        bias = bias.contiguous()
        prepare.launch(
            LaunchKind.ADD_BIAS,
            kernel.launch(out, bias),
            (out, bias),
            dtypes=(out.dtype, out.dtype),
            sizes=(tokens, out_features, 0),
        )
    elif bias is not None:
        out += bias
    return out


@register(
    "packed_tokens_matmul(Tensor packed, Tensor weight, Tensor? bias, SymInt tokens, str backend) -> Tensor",
    fake=_fake_packed_tokens_matmul,
    cuda=_cuda_packed_tokens_matmul,
    hot=True,
)
def packed_tokens_matmul(packed: Tensor, weight: Tensor, bias: Tensor | None, tokens: int, backend: Backend) -> Tensor:
    """x~ W^T + bias with x~ packed. On CUDA y is rounded twice: before the bias is added, and after.

    Args:
        packed: x~, the first buffer of pack_tokens.
        weight: N x K, of the packed dtype.
        bias: (N,), of the packed dtype, or None.
        tokens: M, before padding.
        backend: As SparseConfig's.

    Returns:
        M x N.
    """
    x = unpack(packed, round_up(tokens, SPARSE_MULTIPLE), weight.shape[1], weight.dtype)[:tokens]
    return torch.nn.functional.linear(x, weight, bias)


def _fake_packed_tokens_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, packed: Tensor, packed_t: Tensor, backend: Backend
) -> Tensor:
    return weight.new_empty(x.shape[0], weight.shape[0])


@register(
    "packed_tokens_linear(Tensor x, Tensor weight, Tensor? bias, Tensor packed, Tensor packed_t, str backend)"
    " -> Tensor",
    fake=_fake_packed_tokens_linear,
    every_device=True,
    differentiable=True,
)
def packed_tokens_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, packed: Tensor, packed_t: Tensor, backend: Backend
) -> Tensor:
    """packed_tokens_matmul with a gradient formula: y = x~ W^T + b, for exported graphs.

    Args:
        x: M x K. Only its number of tokens is read; it receives the gradient dy W.
        weight: N x K, of the packed dtype.
        bias: (N,), of the packed dtype, or None.
        packed: x~, as pack_tokens gives it for x.
        packed_t: Its transpose, for dW = dy^T x~.
        backend: As SparseConfig's.
    """
    return packed_tokens_matmul(packed, weight, bias, x.shape[0], backend)


def _fake_packed_tokens_grad_weight(
    packed_t: Tensor, grad_output: Tensor, in_features: int, backend: Backend
) -> Tensor:
    return grad_output.new_empty(grad_output.shape[1], in_features)


def _cuda_packed_tokens_grad_weight(
    packed_t: Tensor, grad_output: Tensor, in_features: int, backend: Backend
) -> Tensor:
    tokens, out_features = grad_output.shape
    if tokens == 0:
        return grad_output.new_zeros(out_features, in_features)
    asked = problem.activation_weight(tokens, out_features, in_features, grad_output.dtype)
    out = grad_output.new_empty(asked.d_shape)
    choice = multiply(asked, packed_t, padded(grad_output, round_up(tokens, SPARSE_MULTIPLE)), out, None, backend)
    sizes = tokens, out_features, in_features
    prepare.product(ProductKind.GRAD_WEIGHT, asked, out.get_device(), sizes, choice, backend)
    return out


@register(
    "packed_tokens_grad_weight(Tensor packed_t, Tensor grad_output, SymInt in_features, str backend) -> Tensor",
    fake=_fake_packed_tokens_grad_weight,
    cuda=_cuda_packed_tokens_grad_weight,
    hot=True,
)
def packed_tokens_grad_weight(packed_t: Tensor, grad_output: Tensor, in_features: int, backend: Backend) -> Tensor:
    """dW = dy^T x~ (N x K) with x~^T packed.

    Args:
        packed_t: x~^T, the second buffer of pack_tokens.
        grad_output: dy (M x N), of the packed dtype.
        in_features: K.
        backend: As SparseConfig's.
    """
    tokens = grad_output.shape[0]
    turned = unpack(packed_t, in_features, round_up(tokens, SPARSE_MULTIPLE), grad_output.dtype)
    return grad_output.mT @ turned[:, :tokens].mT


def sac_save_ops() -> list[torch._ops.OpOverload]:
    """Ops whose results selective activation checkpointing should save: the products, not the packings.

    pack_linear is both: with its product the packed weight is saved, 9/16 of the weight's 16-bit bytes.
    """
    ops = torch.ops.semisparse
    products = ops.packed_matmul, ops.pack_linear, ops.packed_tokens_matmul, ops.fp8_product, ops.fp8_dense_product
    return [product.default for product in products]


def multiply(
    asked: Problem, packed: Tensor, b: Tensor, out: Tensor, bias: Tensor | None, backend: Backend
) -> Choice | None:
    """D = A B (+ bias) by the engine or, where backend or tuning say so, masked dense; out is written.

    Args:
        asked: The product, of 16-bit or float8_e4m3fn operands.
        packed: A, as a packing op gives it.
        b: B, of the problem's shape.
        out: D.
        bias: As Operands'.
        backend: As SparseConfig's.

    Returns:
        What dispatch.multiply followed.
    """

    def unpacked(buffer: Tensor) -> Tensor:
        return _cuda_unpack(buffer, asked.rows, asked.reduction, asked.dtype)

    return dispatch.multiply(asked, Operands(packed, b, out, bias), unpacked, backend)


def padded(matrix: Tensor, rows: int) -> Tensor:
    """matrix with rows of zeros added up to rows, contiguous and 16-byte aligned, as the engine takes it."""
    if matrix.shape[0] != rows:
        return torch.nn.functional.pad(matrix, (0, 0, 0, rows - matrix.shape[0]))
    return _aligned(matrix)


def _aligned(tensor: Tensor) -> Tensor:
    """tensor itself where it is contiguous and 16-byte aligned (a view into a flat buffer may not be), else a copy."""
    if tensor.data_ptr() % ALIGNMENT:
        return tensor.clone(memory_format=torch.contiguous_format)
    return tensor.contiguous()
