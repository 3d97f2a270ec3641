"""What the ops do without a GPU: the reference packs, into the sm90 layout, and products are masked dense."""

from collections.abc import Callable, Iterable
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor

from semisparse.errors import ConfigError, ShapeError, TensorError
from semisparse.formats.layout import SM90_16BIT, SPARSE_MULTIPLE, packed_bytes, round_up
from semisparse.pattern import GROUP
from semisparse.reference import linear as reference_linear
from semisparse.reference import masks as reference_masks
from semisparse.reference import packing as reference_packing

_MASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposable": reference_masks.transposable,
    "row": reference_masks.row,
    "greedy": reference_masks.greedy,
    "signed_greedy": partial(reference_masks.greedy, signed=True),
}


def _without_autocast(op: Callable[..., Any]) -> Callable[..., Any]:
    """op with autocast off for what it computes inside: dtypes are arguments here, and torch.cat under the other 16-bit
    autocast raises."""

    @wraps(op)
    def call(matrix: Tensor, *args: Any) -> Any:
        device = matrix.device.type
        if device == "meta" or not torch.is_autocast_enabled(device):
            return op(matrix, *args)
        with torch.autocast(device, enabled=False):
            return op(matrix, *args)

    return call


ROW_WISE = frozenset({"row", "soft"})
"""Masks that are 2:4 along the columns only, so that no transpose is packed."""


def choose(matrix: Tensor, mask: str, frozen: Tensor | None) -> Tensor:
    """The bool mask (R x C) called mask; for "codes" the one that the tile codes in frozen describe."""
    if mask == "codes":
        return reference_masks.from_codes(check_frozen(matrix, mask, frozen))
    if mask not in _MASKS:
        raise _unknown(mask, (*_MASKS, "codes", "soft"))
    return _MASKS[mask](matrix)


def _unknown(mask: str, known: Iterable[str]) -> ConfigError:
    return ConfigError(f"mask={mask!r} is not one of {', '.join(map(repr, known))}")


def check_frozen(matrix: Tensor, mask: str, frozen: Tensor | None) -> Tensor:
    """frozen, if mask "codes" or "soft" can use it on matrix. Raises ConfigError, TensorError, ShapeError."""
    if frozen is None:
        raise ConfigError(f"mask={mask!r} needs what a recipe froze: start one (semisparse.recipes) before the forward")
    soft = mask == "soft"
    reference_masks.check_shape(matrix, tiles=not soft)
    reference_masks.check_dtype(matrix)
    dtype, shape = (
        (torch.float32, torch.Size([])) if soft else (torch.int16, torch.Size(size // GROUP for size in matrix.shape))
    )
    if frozen.dtype != dtype or frozen.device != matrix.device:
        raise TensorError(
            f"frozen is {frozen.dtype} on {frozen.device}; mask={mask!r} of a weight on {matrix.device} needs {dtype} "
            "there: start the recipe after moving the model"
        )
    if frozen.shape != shape:
        raise ShapeError(f"frozen has shape {tuple(frozen.shape)}; mask={mask!r} needs {tuple(shape)}")
    return frozen


@_without_autocast
def tile_codes(matrix: Tensor, mask: str) -> Tensor:
    """ops.tile_codes."""
    if mask == "transposable":
        return reference_masks.transposable_codes(matrix).to(torch.int16)
    if mask not in _MASKS:
        raise _unknown(mask, _MASKS)
    return reference_masks.to_codes(_MASKS[mask](matrix)).to(torch.int16)


@_without_autocast
def prune(matrix: Tensor, dtype: torch.dtype, mask: str, frozen: Tensor | None = None) -> Tensor:
    """ops.prune; the specification itself is plain PyTorch, so this serves every device."""
    matrix = matrix.detach()  # the op has no gradient of its own, and autograd must not find where()'s
    if mask == "soft":
        # Rounded once: the threshold of a 16-bit matrix is subtracted and scaled in fp32, as the pack kernel does.
        wide = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
        return reference_linear.soft_threshold(wide, check_frozen(matrix, mask, frozen)).to(dtype).contiguous()
    return reference_linear.prune(matrix, choose(matrix, mask, frozen)).to(dtype).contiguous()


@_without_autocast
def prune_tokens(x: Tensor, dtype: torch.dtype) -> Tensor:
    """ops.prune_tokens; serves every device."""
    return reference_linear.prune_tokens(x.detach()).to(dtype).contiguous()


def _encoded(matrix: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    written = SM90_16BIT.encode(reference_packing.pack(matrix, mask, dtype))
    return torch.nn.functional.pad(written, (0, packed_bytes(*matrix.shape) - written.numel()))


@_without_autocast
def pack(matrix: Tensor, dtype: torch.dtype, mask: str, frozen: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """ops.pack."""
    if mask == "soft":
        soft = prune(matrix, dtype, mask, frozen)
        return _encoded(soft, reference_masks.row(matrix), dtype), torch.empty(0, dtype=torch.uint8)
    kept = choose(matrix, mask, frozen)
    if mask == "row":
        return _encoded(matrix, kept, dtype), torch.empty(0, dtype=torch.uint8)
    return _encoded(matrix, kept, dtype), _encoded(matrix.mT, kept.mT, dtype)


@_without_autocast
def pack_tokens(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """ops.pack_tokens."""
    rows = round_up(x.shape[0], SPARSE_MULTIPLE)
    return pack(torch.nn.functional.pad(x, (0, 0, 0, rows - x.shape[0])), dtype, "transposable")


@_without_autocast
def unpack(packed: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """ops.unpack."""
    return reference_packing.unpack(SM90_16BIT.decode(packed, rows, columns, dtype))


@_without_autocast
def packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, engine: str) -> Tensor:
    """ops.packed_linear, masked dense."""
    return torch.nn.functional.linear(x, unpack(packed, out_features, x.shape[1], x.dtype), bias)


@_without_autocast
def packed_tokens_linear(packed: Tensor, weight: Tensor, bias: Tensor | None, tokens: int, engine: str) -> Tensor:
    """ops.packed_tokens_linear, masked dense."""
    x = unpack(packed, round_up(tokens, SPARSE_MULTIPLE), weight.shape[1], weight.dtype)[:tokens]
    return torch.nn.functional.linear(x, weight, bias)


@_without_autocast
def packed_tokens_grad_weight(packed_t: Tensor, grad_output: Tensor, in_features: int, engine: str) -> Tensor:
    """ops.packed_tokens_grad_weight, masked dense."""
    tokens = grad_output.shape[0]
    x_t = unpack(packed_t, in_features, round_up(tokens, SPARSE_MULTIPLE), grad_output.dtype)[:, :tokens]
    return grad_output.mT @ x_t.mT
