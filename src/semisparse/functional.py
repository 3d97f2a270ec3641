"""Linear functions with one operand pruned to 2:4, and their gradients. The only file with gradient formulas.

Both functions prune in the forward pass and let the gradient pass straight through the pruning (straight-through
estimator): with W~ the pruned weight and x~ the pruned input,

    weight operand        y = x W~^T + b    dx = dy W~    dW = dy^T x
    activation operand    y = x~ W^T + b    dx = dy W     dW = dy^T x~

Under autocast the operand is pruned from its stored dtype (an fp32 master weight, say) and rounded to the autocast
dtype in the same pass; gradients come back in the parameter's dtype.

There are two routes with the same masks. *Masked dense* prunes and calls F.linear: any device, dtype and size. *Packed*
is for fp16 and bf16 on CUDA with N and K multiples of 16: the operand is packed once for both directions and multiplied
by the packed_* ops, whose engine may still choose a dense product inside the op.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from semisparse import ops
from semisparse.errors import EngineError, ShapeError, TensorError
from semisparse.gemm.problem import DTYPES as PACKED_DTYPES
from semisparse.gemm.problem import SPARSE_MULTIPLE
from semisparse.pattern import GROUP
from semisparse.reference.masks import FLOAT_DTYPES


class _Given:
    """Arguments as they were passed."""

    __slots__ = ("args", "kwargs")

    def __init__(self, args: tuple[Any, ...]) -> None:
        self.args, self.kwargs = args, dict[str, Any]()

    def apply_defaults(self) -> None:
        """There are none."""


class _AllGiven(inspect.Signature):
    """Signature of a function that is always called with all its arguments, by position."""

    __slots__ = ()

    def bind(self, /, *args: Any, **kwargs: Any) -> _Given:  # type: ignore[override]
        return _Given(args)


def _signed(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Spare the calls of an autograd function most of their host time.

    PyTorch inspects the signature of forward and binds the arguments at every call, in some 130 Python calls, which is
    a third of a whole training step of one layer; with this signature it takes five.
    """
    signature = _AllGiven([*inspect.signature(forward).parameters.values()])
    forward.__signature__ = signature  # type: ignore[attr-defined]
    return forward


class _PruneWeight(torch.autograd.Function):
    """W -> W~ in the compute dtype; the gradient reaches W unchanged, in W's dtype."""

    @staticmethod
    @_signed
    def forward(weight: Tensor, dtype: torch.dtype, mask: str) -> Tensor:
        return ops.prune(weight, dtype, mask)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, grad_pruned: Tensor) -> tuple[Tensor, None, None]:
        return grad_pruned.to(ctx.dtype), None, None


class _PruneTokens(torch.autograd.Function):
    """x -> x~ in the compute dtype; the gradient reaches x unchanged, in x's dtype."""

    @staticmethod
    @_signed
    def forward(x: Tensor, dtype: torch.dtype) -> Tensor:
        return ops.prune_tokens(x, dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, grad_pruned: Tensor) -> tuple[Tensor, None]:
        return grad_pruned.to(ctx.dtype), None


class _PackedLinear(torch.autograd.Function):
    """y = x W~^T + b from the packed weight; x (M, K) and bias in the compute dtype, weight only receives its gradient.

    Of the packings only the one that the input gradient needs lives on to the backward pass: W~^T, or W~ where the mask
    is 2:4 along K only and the input gradient is therefore a masked dense product. A double backward raises.
    """

    @staticmethod
    @_signed
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, packed: Tensor, packed_t: Tensor, mask: str, engine: str
    ) -> Tensor:
        return ops.packed_linear(x, packed, bias, weight.shape[0], engine)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, packed, packed_t, ctx.mask, ctx.engine = inputs
        ctx.weight_dtype, ctx.weight_shape, ctx.dtype = weight.dtype, weight.shape, x.dtype
        ctx.save_for_backward(
            x if ctx.needs_input_grad[1] else None,
            (packed_t if ctx.mask == "transposable" else packed) if ctx.needs_input_grad[0] else None,
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, packed = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0] and ctx.mask == "transposable":
            grad_x = ops.packed_linear(grad_output, packed, None, ctx.weight_shape[1], ctx.engine)
        elif ctx.needs_input_grad[0]:
            rows, columns = ctx.weight_shape
            grad_x = grad_output @ ops.unpack(packed, rows, columns, ctx.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = (grad_output.mT @ x).to(ctx.weight_dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = grad_output.sum(0)
        return grad_x, grad_weight, grad_bias, None, None, None, None


class _PackedTokensLinear(torch.autograd.Function):
    """y = x~ W^T + b from the packed input; weight and bias in the compute dtype, x only receives its gradient."""

    @staticmethod
    @_signed
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, packed: Tensor, packed_t: Tensor, engine: str
    ) -> Tensor:
        return ops.packed_tokens_linear(packed, weight, bias, x.shape[0], engine)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, _, packed_t, ctx.engine = inputs
        ctx.x_dtype, ctx.in_features = x.dtype, x.shape[1]
        ctx.save_for_backward(
            weight if ctx.needs_input_grad[0] else None, packed_t if ctx.needs_input_grad[1] else None
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        weight, packed_t = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_output @ weight).to(ctx.x_dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = ops.packed_tokens_grad_weight(packed_t, grad_output, ctx.in_features, ctx.engine)
        if ctx.needs_input_grad[2]:
            grad_bias = grad_output.sum(0)
        return grad_x, grad_weight, grad_bias, None, None, None


def semi_sparse_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    mask: str = "transposable",
    engine: str = "auto",
    packed: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """y = x W~^T + b with W~ the weight pruned to 2:4 by magnitude at this call. Returns (..., N).

    x: (..., K), weight: (N, K) with N and K multiples of 4, bias: (N,) or None; any strides, fp64, fp32, fp16 or bf16,
    all of one dtype unless autocast is on. mask: "transposable" or "row"; engine: "auto", "cusparselt" or "dense" (see
    SparseConfig). packed: the result of ops.pack for this weight, mask and compute dtype, when it is to be used again.
    The mask is exact; products err as PyTorch's own in the compute dtype do. Raises ShapeError, TensorError.
    """
    check_operands(x, weight, bias)
    dtype = compute_dtype(x, weight)
    if not packs(weight, dtype, engine):
        pruned: Tensor = _PruneWeight.apply(weight, dtype, mask)
        return F.linear(x, pruned, bias)
    forward, transposed = ops.pack(weight.detach(), dtype, mask) if packed is None else packed
    tokens = _tokens(x).to(dtype)
    bias = None if bias is None else bias.to(dtype)
    y: Tensor = _PackedLinear.apply(tokens, weight, bias, forward, transposed, mask, engine)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], weight.shape[0])


def semi_sparse_activation_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, engine: str = "auto"
) -> Tensor:
    """y = x~ W^T + b with x~ the input pruned by 4x4 tiles over (tokens, features). Returns (..., N).

    Leading dimensions of x are flattened to tokens in order; a token count that is no multiple of 4 counts zero rows.
    Shapes, dtypes, engine, exactness and errors as semi_sparse_linear. The gradient of x passes straight through.
    """
    check_operands(x, weight, bias)
    dtype = compute_dtype(x, weight)
    tokens = _tokens(x)
    if not packs(weight, dtype, engine):
        pruned: Tensor = _PruneTokens.apply(tokens, dtype)
        return F.linear(pruned.view(x.shape), weight, bias)
    packed, packed_t = ops.pack_tokens(tokens.detach(), dtype)
    bias = None if bias is None else bias.to(dtype)
    # The engine adds no bias along these rows, so the op passes over y again. A compiler fuses that into what follows.
    compiling = torch.compiler.is_compiling()
    inside = None if compiling else bias
    y: Tensor = _PackedTokensLinear.apply(tokens, weight.to(dtype), inside, packed, packed_t, engine)
    y = y + bias if compiling and bias is not None else y
    return y if x.dim() == 2 else y.view(*x.shape[:-1], weight.shape[0])


def _tokens(x: Tensor) -> Tensor:
    """x as a matrix of tokens, M x K."""
    return x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])


def packs(weight: Tensor, dtype: torch.dtype, engine: str) -> bool:
    """Whether a layer with this weight takes the packed route; a fact of device, dtype and sizes alone.

    Raises EngineError, with the reason, where engine="cusparselt" asks for a route that is not there.
    """
    sizes_fit = not (weight.shape[0] % SPARSE_MULTIPLE or weight.shape[1] % SPARSE_MULTIPLE)
    possible = weight.is_cuda and dtype in PACKED_DTYPES and sizes_fit
    if engine == "cusparselt" and not possible:
        raise EngineError(
            f"engine='cusparselt' needs a CUDA weight in fp16 or bf16 with N and K multiples of {SPARSE_MULTIPLE}; "
            f"it is {tuple(weight.shape)} on {weight.device}, computed in {dtype}: use engine='auto' or torch.autocast"
        )
    return possible and engine != "dense"


def compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype of the products: autocast's where autocast applies (never to fp64), else the weight's."""
    if x.dtype == torch.float64 or weight.dtype == torch.float64 or not autocast_enabled(x.device):
        return weight.dtype
    return torch.get_autocast_dtype(x.device.type)


def autocast_enabled(device: torch.device) -> bool:
    """Whether torch.autocast is on for device; False for meta, which has none, instead of torch's RuntimeError."""
    # Not torch.amp.is_autocast_available: torch.compile of torch 2.11 cannot trace it.
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def check_operands(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise ShapeError or TensorError, naming the operand, unless the three operands fit together."""
    if weight.dim() != 2 or weight.shape[0] % GROUP or weight.shape[1] % GROUP:
        raise ShapeError(
            f"weight has shape {tuple(weight.shape)}; it must be (N, K), both multiples of {GROUP}: "
            "keep this layer dense or pad it"
        )
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ShapeError(f"x has shape {tuple(x.shape)}; its last size must be in_features={weight.shape[1]}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ShapeError(f"bias has shape {tuple(bias.shape)}; it must be ({weight.shape[0]},)")
    autocast = autocast_enabled(x.device)
    for name, tensor in (("weight", weight), ("x", x), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.device != weight.device:
            raise TensorError(f"{name} is on {tensor.device}, weight on {weight.device}; move both to one device")
        if tensor.dtype not in FLOAT_DTYPES:
            raise TensorError(f"{name} has dtype {tensor.dtype}; use float64, float32, float16 or bfloat16")
        if tensor.dtype != weight.dtype and (not autocast or torch.float64 in (tensor.dtype, weight.dtype)):
            raise TensorError(
                f"{name} has dtype {tensor.dtype}, weight {weight.dtype}; convert one of them or use torch.autocast "
                "(which leaves float64 as it is)"
            )
