"""Linear functions with one operand pruned to 2:4, and their gradients (computed in autograd.py).

Both functions prune in the forward pass and let the gradient pass straight through the pruning (straight-through
estimator): with W~ the pruned weight and x~ the pruned input,

    pruned weight        y = x W~^T + b    dx = dy W~    dW = dy^T x    or, with grad_output="mvue", S(dy)^T x
    pruned activation    y = x~ W^T + b    dx = dy W     dW = dy^T x~

Under autocast the operand is pruned from its stored dtype (an fp32 master weight, say) and rounded to the autocast
dtype in the same pass; gradients come back in the parameter's dtype.

There are two routes with the same masks. *Masked dense* prunes and calls F.linear: any device, dtype and size, and
every torch.func transform. *Packed* is for fp16 and bf16 on CUDA with N and K multiples of 16: the operand is packed
once for both directions and multiplied by the packed ops, whose engine may still choose a dense product inside.
precision="fp8" has a route of its own (functional_fp8.py), and takes one of these where it cannot run.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from semisparse import masks, ops, routes
from semisparse.autograd import (
    ForwardPackedLinear,
    PackedLinear,
    PackedTokensLinear,
    PackLinear,
    TransformedPackedLinear,
    TransformedPackedTokensLinear,
    TransformedPruneTokens,
    TransformedPruneWeight,
    TransformedSampledLinear,
    apply,
)
from semisparse.config import Backend, GradOutput, Precision, check_grad_output, check_precision
from semisparse.errors import ConfigError
from semisparse.formats.packed import PackedMatrix
from semisparse.functional_fp8 import fp8_linear
from semisparse.masks import MaskName
from semisparse.operands import as_tokens, check_operands, compute_dtype, distinct, in_dtype, in_rows
from semisparse.tracing import recording


def semi_sparse_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    mask: MaskName | None = "transposable",
    codes: Tensor | None = None,
    scale: Tensor | None = None,
    grad_output: GradOutput | None = None,
    seed: Tensor | None = None,
    precision: Precision | None = None,
    repack: bool = False,
    backend: Backend = "auto",
    packed: PackedMatrix | None = None,
) -> Tensor:
    """y = x W~^T + b with W~ the weight pruned to 2:4 by magnitude at this call. The mask is exact.

    Args:
        input: (..., K), or a jagged nested tensor of such rows.
        weight: (N, K), N and K multiples of 4.
        bias: (N,) or None. Operands have any strides and one dtype, fp64, fp32, fp16 or bf16; with autocast, several.
        mask: As SparseConfig's weight; None, with precision="fp8" alone, computes with the whole weight.
        codes: Tile codes to use instead of choosing some (int16, N/4 x K/4; that they are transposable is not checked).
        scale: What mask "soft" multiplies by (one fp32 number), required by it.
        grad_output: As SparseConfig's.
        seed: Key of grad_output's random numbers (one int64 number), read in the backward; None for the key 0.
        precision: As SparseConfig's, with the same exclusions.
        repack: As SparseConfig's, not with precision; without effect where no transpose would be kept.
        backend: As SparseConfig's.
        packed: ops.pack's result for these arguments, to use it again (in fp8 ops.pack_fp8's, which is whole); without
            its transpose, the backward packs that.

    Returns:
        (..., N), in the compute dtype; products err as PyTorch's own in that dtype do, in fp8 as e4m3 does.

    Raises:
        ShapeError, TensorError: The operands do not fit together.
        ConfigError: Two arguments exclude each other, or grad_output is unknown or used in a compiled transform.
        EngineError: backend="cusparselt" cannot run here.
    """
    if input.is_nested:
        held = partial(semi_sparse_linear, mask=mask, codes=codes, scale=scale, grad_output=grad_output, seed=seed)
        how = partial(held, precision=precision, repack=repack, backend=backend, packed=packed)
        return in_rows(input, lambda rows: how(rows, weight, bias))
    check_grad_output(grad_output)
    check_operands(input, weight, bias)
    dtype = compute_dtype(input, weight)
    transform = routes.transform_at_work(backend)
    if precision is not None or mask is None:
        _check_fp8(mask, codes, scale, grad_output, precision, repack, backend)
        if transform != "other" and routes.takes_fp8(weight, dtype, mask, backend):
            return fp8_linear(input, weight, bias, dtype, mask, codes, backend, packed, transform, grad_output, seed)
        if mask is None:
            return F.linear(input, weight, bias)
        packed = None if packed is None or packed.scale is not None else packed
    if transform == "other" or not routes.packs(weight, dtype, backend):
        pruned = _pruned_weight(weight, dtype, mask, codes, scale, transform)
        return F.linear(input, pruned, bias) if grad_output is None else _sampled(input, pruned, bias, seed, transform)
    how_packed = mask, codes, scale, grad_output, seed, repack, backend, packed, transform
    return _packed_linear(distinct(in_dtype(dtype, input)), weight, bias, dtype, *how_packed)


def _packed_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    mask: MaskName,
    codes: Tensor | None,
    scale: Tensor | None,
    grad_output: GradOutput | None,
    seed: Tensor | None,
    repack: bool,
    backend: Backend,
    packed: PackedMatrix | None,
    transform: str,
) -> Tensor:
    """semi_sparse_linear on the packed route, x in the compute dtype."""
    bias, recorded = None if bias is None else in_dtype(dtype, bias), recording()
    if repack and packed is None and not (recorded or transform) and masks.get(mask).both_ways:
        packed = PackedMatrix(
            ops.pack(weight.detach(), dtype, mask, codes, scale)[0], x.new_empty(0, dtype=torch.uint8)
        )
    if packed is None and not (recorded or transform):
        if not torch.is_grad_enabled():
            return ops.pack_linear(x, weight, bias, mask, codes, scale, backend)[0]
        return apply(PackLinear, x, weight, bias, mask, codes, scale, backend, grad_output, seed)
    if packed is None or ((recorded or transform) and not packed.transposed.numel()):
        packed = PackedMatrix(*ops.pack(weight.detach(), dtype, mask, codes, scale))
    if not packed.transposed.numel() and masks.get(mask).both_ways:
        return ForwardPackedLinear.apply(x, weight, bias, packed[0], codes, scale, mask, backend, grad_output, seed)
    operands = x, weight, bias, packed.matrix, packed.transposed, mask, backend, grad_output, seed
    if recorded or transform:
        return (ops.packed_linear if recorded else TransformedPackedLinear.apply)(*operands)
    return apply(PackedLinear, *operands)


def semi_sparse_activation_linear(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: Backend = "auto"
) -> Tensor:
    """y = x~ W^T + b with x~ the input pruned by 4x4 tiles over (tokens, features).

    Leading dimensions of input are flattened to tokens in order; a token count that is not a multiple of 4 counts rows
    of zeros. The gradient of the input passes straight through. What is kept of a token depends on the other tokens of
    its tile.

    Args:
        input: As semi_sparse_linear's.
        weight: As semi_sparse_linear's.
        bias: As semi_sparse_linear's.
        backend: As SparseConfig's.

    Returns:
        (..., N), in the compute dtype; exact as semi_sparse_linear is.

    Raises:
        ShapeError, TensorError, EngineError: As semi_sparse_linear.
    """
    if input.is_nested:
        return in_rows(input, lambda rows: semi_sparse_activation_linear(rows, weight, bias, backend=backend))
    check_operands(input, weight, bias)
    dtype = compute_dtype(input, weight)
    tokens = as_tokens(input)
    if (transform := routes.transform_at_work(backend)) == "other" or not routes.packs(weight, dtype, backend):
        return F.linear(_pruned_tokens(tokens, dtype, transform).view(input.shape), weight, bias)
    buffers = ops.pack_tokens(tokens.detach(), dtype)
    weight, bias = in_dtype(dtype, weight), None if bias is None else in_dtype(dtype, bias)
    # The engine adds no bias along these rows, so the op passes over y again. A compiler fuses that into what follows.
    compiling = torch.compiler.is_compiling()
    operands = distinct(tokens), weight, None if compiling else bias, *buffers, backend
    if recording():
        y = ops.packed_tokens_linear(*operands)
    else:
        y = (TransformedPackedTokensLinear if transform else PackedTokensLinear).apply(*operands)
    y = y + bias if compiling and bias is not None else y
    return y if input.dim() == 2 else y.view(*input.shape[:-1], weight.shape[0])


def _check_fp8(
    mask: str | None,
    codes: Tensor | None,
    scale: Tensor | None,
    grad_output: str | None,
    precision: str | None,
    repack: bool,
    backend: str,
) -> None:
    """Raise ConfigError where precision is unknown or excludes what else is given."""
    check_precision(precision)
    if precision is None:
        raise ConfigError("mask=None prunes nothing: name a mask, call F.linear, or set precision='fp8'")
    if scale is not None:
        raise ConfigError(f"precision={precision!r} does not work together with scale: leave scale out")
    if repack:
        raise ConfigError(f"precision={precision!r} does not work together with repack=True: leave repack out")
    if mask is None and backend == "cusparselt":
        raise ConfigError("backend='cusparselt' has no sparse product to compute with mask=None: use 'auto'")
    for name, given in (("codes", codes), ("grad_output", grad_output)):
        if mask is None and given is not None:
            raise ConfigError(f"mask=None takes no {name}: leave {name} out, or set mask='transposable'")


def _pruned_weight(
    weight: Tensor, dtype: torch.dtype, mask: str, codes: Tensor | None, scale: Tensor | None, transform: str
) -> Tensor:
    if transform and torch.compiler.is_compiling():
        return _through(weight, ops.prune(weight.detach(), dtype, mask, codes, scale))
    prune = TransformedPruneWeight.apply if transform else ops.prune
    return prune(weight, dtype, mask, codes, scale)


def _sampled(input: Tensor, pruned: Tensor, bias: Tensor | None, seed: Tensor | None, transform: str) -> Tensor:
    """The masked dense product whose weight gradient is sampled."""
    if transform and torch.compiler.is_compiling():
        raise ConfigError(
            "grad_output='mvue' cannot run inside a compiled torch.func transform, which ignores gradient formulas: "
            "transform uncompiled code, or use grad_output=None"
        )
    operands = in_dtype(pruned.dtype, input), pruned, None if bias is None else in_dtype(pruned.dtype, bias), seed
    return TransformedSampledLinear.apply(*operands) if transform else ops.sampled_linear(*operands)


def _pruned_tokens(tokens: Tensor, dtype: torch.dtype, transform: str) -> Tensor:
    if transform and torch.compiler.is_compiling():
        return _through(tokens, ops.prune_tokens(tokens.detach(), dtype))
    prune = TransformedPruneTokens.apply if transform else ops.prune_tokens
    return prune(tokens, dtype)


def _through(matrix: Tensor, pruned: Tensor) -> Tensor:
    """pruned, with the straight-through gradient written as arithmetic that any transform differentiates.

    Exact where an entry is finite and kept or dropped as it is; mask "soft" is rounded once more, and a pruned Inf
    gives NaN.
    """
    stored = matrix.to(pruned.dtype)
    return stored + (pruned - stored.detach())
