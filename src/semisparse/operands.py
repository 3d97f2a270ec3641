"""The operands of a linear function: whether they fit together, the dtype they are computed in, and their shapes."""

from collections.abc import Callable

import torch
from torch import Tensor

from semisparse.errors import ShapeError, TensorError
from semisparse.pattern import GROUP
from semisparse.reference.masks import FLOAT_DTYPES


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
    """Check that the operands of one call fit together. Ops take this as given; the engine checks what it hands over.

    Args:
        input: (..., K).
        weight: (N, K), both multiples of 4.
        bias: (N,) or None.

    Raises:
        ShapeError: A shape does not fit.
        TensorError: A device or dtype does not fit, or a dtype is not a float of at least 16 bits.
    """
    shape, dtype, device = weight.shape, weight.dtype, weight.device
    if not (
        len(shape) == 2
        and not (shape[0] % GROUP or shape[1] % GROUP)
        and dtype in FLOAT_DTYPES
        and input.dim()
        and input.shape[-1] == shape[1]
        and input.dtype == dtype
        and input.device == device
        and (bias is None or (bias.shape == shape[:1] and bias.dtype == dtype and bias.device == device))
    ):
        _check_in_words(input, weight, bias)


def _check_in_words(input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """The same, with an error for the first operand that does not fit; mixed dtypes fit under autocast."""
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


def as_tokens(x: Tensor) -> Tensor:
    """x as a matrix of tokens, M x K."""
    return x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])


def distinct(tokens: Tensor) -> Tensor:
    """tokens, in compiled code as a tensor of its own, for the case that it is the weight, too.

    torch.compile of torch 2.11 gives a tensor that an autograd.Function takes twice the gradient of one place only
    (relative error 0.66 on an H100). As a view it is another tensor, and the compiler drops the view again.
    """
    return tokens.view_as(tokens) if torch.compiler.is_compiling() else tokens


def in_dtype(dtype: torch.dtype, tensor: Tensor) -> Tensor:
    """tensor itself where it has dtype already, else converted."""
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def in_rows(nested: Tensor, call: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply call to all rows of a jagged nested tensor.

    Args:
        nested: (B, ragged, K), in the jagged layout without holes.
        call: All rows as one (rows, K) tensor -> (rows, N).

    Returns:
        (B, ragged, N), with the same raggedness.

    Raises:
        TensorError: nested is of another kind.
    """
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
