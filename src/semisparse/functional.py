"""Linear functions with one operand pruned to 2:4, and their gradients (computed in autograd.py).

Both functions prune in the forward pass and let the gradient pass straight through the pruning (straight-through
estimator): with W~ the pruned weight and x~ the pruned input,

    pruned weight        y = x W~^T + b    dx = dy W~    dW = dy^T x
    pruned activation    y = x~ W^T + b    dx = dy W     dW = dy^T x~

Under autocast the operand is pruned from its stored dtype (an fp32 master weight, say) and rounded to the autocast
dtype in the same pass; gradients come back in the parameter's dtype.

There are two routes with the same masks. *Masked dense* prunes and calls F.linear: any device, dtype and size, and
every torch.func transform. *Packed* is for fp16 and bf16 on CUDA with N and K multiples of 16: the operand is packed
once for both directions and multiplied by the packed ops, whose engine may still choose a dense product inside.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from semisparse import ops
from semisparse.autograd import (
    PackedLinear,
    PackedTokensLinear,
    TransformedPackedLinear,
    TransformedPackedTokensLinear,
    TransformedPruneTokens,
    TransformedPruneWeight,
)
from semisparse.config import Backend
from semisparse.errors import EngineError, ShapeError, TensorError
from semisparse.formats.layout import PACKED_DTYPES, SPARSE_MULTIPLE
from semisparse.formats.packed import PackedMatrix
from semisparse.masks import MaskName
from semisparse.pattern import GROUP
from semisparse.reference.masks import FLOAT_DTYPES
from semisparse.tracing import exporting, transforming


def semi_sparse_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    mask: MaskName = "transposable",
    codes: Tensor | None = None,
    scale: Tensor | None = None,
    backend: Backend = "auto",
    packed: PackedMatrix | None = None,
) -> Tensor:
    """y = x W~^T + b with W~ the weight pruned to 2:4 by magnitude at this call.

    The mask is exact; products err as PyTorch's own in the compute dtype do.

    Args:
        input: (..., K), or a jagged nested tensor of such rows.
        weight: (N, K), N and K multiples of 4.
        bias: (N,) or None. All operands have any strides and one dtype of fp64, fp32, fp16 and bf16; under autocast
            the dtypes may differ.
        mask: As SparseConfig's weight.
        codes: Tile codes of a fixed transposable mask to use instead of choosing one (int16, N/4 x K/4; that they are
            transposable is not checked).
        scale: What mask "soft" multiplies by (one fp32 number), required by it.
        backend: As SparseConfig's.
        packed: ops.pack's result for this weight, mask, codes, scale and compute dtype, to use it again.

    Returns:
        (..., N), in the compute dtype.

    Raises:
        ShapeError, TensorError: The operands do not fit together.
        ConfigError: codes or scale do not fit mask.
        EngineError: backend="cusparselt" cannot run here.
    """
    if input.is_nested:
        held = partial(semi_sparse_linear, mask=mask, codes=codes, scale=scale, backend=backend, packed=packed)
        return _in_rows(input, lambda rows: held(rows, weight, bias))
    check_operands(input, weight, bias)
    dtype = compute_dtype(input, weight)
    if (transform := _transform(backend)) == "other" or not packs(weight, dtype, backend):
        return F.linear(input, _pruned_weight(weight, dtype, mask, codes, scale, transform), bias)
    if packed is None:
        packed = PackedMatrix(*ops.pack(weight.detach(), dtype, mask, codes, scale))
    tokens, bias = _distinct(_in(dtype, _tokens(input))), None if bias is None else _in(dtype, bias)
    operands = tokens, weight, bias, packed.matrix, packed.transposed, mask, backend
    if torch.compiler.is_compiling() and exporting():
        y = ops.packed_linear(*operands)
    else:
        y = (TransformedPackedLinear if transform else PackedLinear).apply(*operands)
    return y if input.dim() == 2 else y.view(*input.shape[:-1], weight.shape[0])


def semi_sparse_activation_linear(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: Backend = "auto"
) -> Tensor:
    """y = x~ W^T + b with x~ the input pruned by 4x4 tiles over (tokens, features).

    Leading dimensions of input are flattened to tokens in order; a token count that is not a multiple of 4 counts rows
    of zeros. The gradient of the input passes straight through. What is kept of a token depends on the other tokens of
    its tile.

    Args:
        input, weight, bias: As semi_sparse_linear's.
        backend: As SparseConfig's.

    Returns:
        (..., N), in the compute dtype; exact as semi_sparse_linear is.

    Raises:
        ShapeError, TensorError, EngineError: As semi_sparse_linear.
    """
    if input.is_nested:
        return _in_rows(input, lambda rows: semi_sparse_activation_linear(rows, weight, bias, backend=backend))
    check_operands(input, weight, bias)
    dtype = compute_dtype(input, weight)
    tokens = _tokens(input)
    if (transform := _transform(backend)) == "other" or not packs(weight, dtype, backend):
        return F.linear(_pruned_tokens(tokens, dtype, transform).view(input.shape), weight, bias)
    buffers = ops.pack_tokens(tokens.detach(), dtype)
    weight, bias = _in(dtype, weight), None if bias is None else _in(dtype, bias)
    # The engine adds no bias along these rows, so the op passes over y again. A compiler fuses that into what follows.
    compiling = torch.compiler.is_compiling()
    operands = _distinct(tokens), weight, None if compiling else bias, *buffers, backend
    if compiling and exporting():
        y = ops.packed_tokens_linear(*operands)
    else:
        y = (TransformedPackedTokensLinear if transform else PackedTokensLinear).apply(*operands)
    y = y + bias if compiling and bias is not None else y
    return y if input.dim() == 2 else y.view(*input.shape[:-1], weight.shape[0])


def _pruned_weight(
    weight: Tensor, dtype: torch.dtype, mask: str, codes: Tensor | None, scale: Tensor | None, transform: str
) -> Tensor:
    if transform and torch.compiler.is_compiling():
        return _through(weight, ops.prune(weight.detach(), dtype, mask, codes, scale))
    prune = TransformedPruneWeight.apply if transform else ops.prune
    return prune(weight, dtype, mask, codes, scale)


def _pruned_tokens(tokens: Tensor, dtype: torch.dtype, transform: str) -> Tensor:
    if transform and torch.compiler.is_compiling():
        return _through(tokens, ops.prune_tokens(tokens.detach(), dtype))
    prune = TransformedPruneTokens.apply if transform else ops.prune_tokens
    return prune(tokens, dtype)


def _distinct(tokens: Tensor) -> Tensor:
    """tokens, in compiled code as a tensor of its own, for the case that it is the weight, too.

    torch.compile of torch 2.11 gives a tensor that an autograd.Function takes twice the gradient of one place only
    (relative error 0.66 on an H100). As a view it is another tensor, and the compiler drops the view again.
    """
    return tokens.view_as(tokens) if torch.compiler.is_compiling() else tokens


def _through(matrix: Tensor, pruned: Tensor) -> Tensor:
    """pruned, with the straight-through gradient written as arithmetic that any transform differentiates.

    Exact where an entry is finite and kept or dropped as it is; mask "soft" is rounded once more, and a pruned Inf
    gives NaN.
    """
    stored = matrix.to(pruned.dtype)
    return stored + (pruned - stored.detach())


def _transform(backend: Backend) -> str:
    """ "" outside torch.func transforms; "grad" inside torch.func.grad alone; "other" where packed ops have no rules.

    Those are vmap, forward mode and, in compiled code, any transform: torch.compile ignores the backward of an
    autograd.Function inside torch.func transforms and differentiates its forward, so that the gradient would be zero.

    Raises:
        EngineError: backend="cusparselt" asks for packed ops where they have no rules.
    """
    if torch.compiler.is_compiling():
        found = "other" if transforming() else ""
    elif torch._C._functorch.maybe_current_level() is not None:
        kinds = torch._C._functorch.TransformType
        levels = torch._C._functorch.get_interpreter_stack() or ()
        found = "other" if any(level.key() in (kinds.Vmap, kinds.Jvp) for level in levels) else "grad"
    else:
        found = "other" if torch.autograd.forward_ad._current_level >= 0 else ""
    if found == "other" and backend == "cusparselt":
        raise EngineError(
            "backend='cusparselt' cannot run inside vmap or forward-mode derivatives, nor in compiled torch.func "
            "transforms: use backend='auto', which computes masked dense there"
        )
    return found


def _in_rows(nested: Tensor, call: Callable[[Tensor], Tensor]) -> Tensor:
    """call on all rows of a jagged nested tensor (B, ragged, K), given back in the same raggedness."""
    if nested.layout is not torch.jagged or nested._ragged_idx != 1 or nested.lengths() is not None:  # type: ignore[attr-defined]
        raise TensorError(
            "input is a nested tensor of another kind than (batch, ragged, features) in the jagged layout without "
            "holes: build it with torch.nested.nested_tensor(..., layout=torch.jagged)"
        )
    values = call(nested.values())
    return torch.nested.nested_tensor_from_jagged(
        values,
        nested.offsets(),  # type: ignore[attr-defined]
        min_seqlen=nested._maybe_min_seqlen,  # type: ignore[attr-defined]
        max_seqlen=nested._maybe_max_seqlen,  # type: ignore[attr-defined]
    )


def _tokens(x: Tensor) -> Tensor:
    """x as a matrix of tokens, M x K."""
    return x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _in(dtype: torch.dtype, tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def packs(weight: Tensor, dtype: torch.dtype, backend: Backend) -> bool:
    """Whether a layer with this weight takes the packed route; a fact of device, dtype and sizes alone.

    Raises EngineError, with the reason, where backend="cusparselt" asks for a route that is not there.
    """
    possible = weight.is_cuda and dtype in PACKED_DTYPES and _sizes_fit(weight)
    if backend == "cusparselt" and not possible:
        raise EngineError(
            f"backend='cusparselt' needs a CUDA weight in fp16 or bf16 with N and K multiples of {SPARSE_MULTIPLE}; "
            f"it is {tuple(weight.shape)} on {weight.device}, computed in {dtype}: use backend='auto' or torch.autocast"
        )
    return possible and backend != "dense"


def why_masked_dense(weight: Tensor, dtype: torch.dtype, backend: Backend) -> str:
    """Why packs() says no, in words; empty where it says yes."""
    if backend == "dense":
        return "backend='dense' asks for it"
    if not weight.is_cuda:
        return f"the weight is on {weight.device}, and sparse products need CUDA"
    if dtype not in PACKED_DTYPES:
        return f"computed in {dtype}, and sparse products need fp16 or bf16: use torch.autocast"
    if not _sizes_fit(weight):
        return f"N x K = {' x '.join(map(str, weight.shape))}, and sparse products need multiples of {SPARSE_MULTIPLE}"
    return ""


def _sizes_fit(weight: Tensor) -> bool:
    return not (weight.shape[0] % SPARSE_MULTIPLE or weight.shape[1] % SPARSE_MULTIPLE)


def compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype of the products: autocast's where autocast applies (never to fp64), else the weight's."""
    if x.dtype == torch.float64 or weight.dtype == torch.float64 or not autocast_enabled(x.device):
        return weight.dtype
    return torch.get_autocast_dtype(x.device.type)


def autocast_enabled(device: torch.device) -> bool:
    """Whether torch.autocast is on for device; False for meta, which has none, instead of torch's RuntimeError."""
    # Not torch.amp.is_autocast_available: torch.compile of torch 2.11 cannot trace it.
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def check_operands(input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise ShapeError or TensorError, naming the operand, unless the three operands fit together."""
    if weight.dim() != 2 or weight.shape[0] % GROUP or weight.shape[1] % GROUP:
        raise ShapeError(
            f"weight has shape {tuple(weight.shape)}; it must be (N, K), both multiples of {GROUP}: "
            "keep this layer dense or pad it"
        )
    if input.dim() == 0 or input.shape[-1] != weight.shape[1]:
        raise ShapeError(f"input has shape {tuple(input.shape)}; its last size must be in_features={weight.shape[1]}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ShapeError(f"bias has shape {tuple(bias.shape)}; it must be ({weight.shape[0]},)")
    autocast = autocast_enabled(input.device)
    for name, tensor in (("weight", weight), ("input", input), ("bias", bias)):
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
