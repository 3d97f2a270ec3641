"""What the ops do without a GPU: the reference packs, into the sm90 layout, and products are masked dense."""

import torch
from torch import Tensor

from semisparse.errors import ConfigError
from semisparse.gemm.layout import SM90_16BIT, packed_bytes
from semisparse.gemm.problem import SPARSE_MULTIPLE, pad
from semisparse.reference import linear as reference_linear
from semisparse.reference import masks as reference_masks
from semisparse.reference import packing as reference_packing

_MASKS = {"transposable": reference_masks.transposable, "row": reference_masks.row}


def prune(matrix: Tensor, dtype: torch.dtype, mask: str) -> Tensor:
    """ops.prune; the specification itself is plain PyTorch, so this serves every device."""
    if mask not in _MASKS:
        raise ConfigError(f"mask={mask!r} is not one of {', '.join(map(repr, _MASKS))}")
    matrix = matrix.detach()  # the op has no gradient of its own, and autograd must not find where()'s
    return reference_linear.prune(matrix, _MASKS[mask](matrix)).to(dtype).contiguous()


def prune_tokens(x: Tensor, dtype: torch.dtype) -> Tensor:
    """ops.prune_tokens; serves every device."""
    return reference_linear.prune_tokens(x.detach()).to(dtype).contiguous()


def _encoded(matrix: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    written = SM90_16BIT.encode(reference_packing.pack(matrix, mask, dtype))
    return torch.nn.functional.pad(written, (0, packed_bytes(*matrix.shape) - written.numel()))


def pack(matrix: Tensor, dtype: torch.dtype, mask: str) -> tuple[Tensor, Tensor]:
    """ops.pack."""
    if mask not in _MASKS:
        raise ConfigError(f"mask={mask!r} is not one of {', '.join(map(repr, _MASKS))}")
    kept = _MASKS[mask](matrix)
    if mask == "row":
        return _encoded(matrix, kept, dtype), torch.empty(0, dtype=torch.uint8)
    return _encoded(matrix, kept, dtype), _encoded(matrix.mT, kept.mT, dtype)


def pack_tokens(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """ops.pack_tokens."""
    rows = pad(x.shape[0], SPARSE_MULTIPLE)
    return pack(torch.nn.functional.pad(x, (0, 0, 0, rows - x.shape[0])), dtype, "transposable")


def unpack(packed: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """ops.unpack."""
    return reference_packing.unpack(SM90_16BIT.decode(packed, rows, columns, dtype))


def packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, engine: str) -> Tensor:
    """ops.packed_linear, masked dense."""
    return torch.nn.functional.linear(x, unpack(packed, out_features, x.shape[1], x.dtype), bias)


def packed_tokens_linear(packed: Tensor, weight: Tensor, bias: Tensor | None, tokens: int, engine: str) -> Tensor:
    """ops.packed_tokens_linear, masked dense."""
    x = unpack(packed, pad(tokens, SPARSE_MULTIPLE), weight.shape[1], weight.dtype)[:tokens]
    return torch.nn.functional.linear(x, weight, bias)


def packed_tokens_grad_weight(packed_t: Tensor, grad_output: Tensor, in_features: int, engine: str) -> Tensor:
    """ops.packed_tokens_grad_weight, masked dense."""
    tokens = grad_output.shape[0]
    x_t = unpack(packed_t, in_features, pad(tokens, SPARSE_MULTIPLE), grad_output.dtype)[:, :tokens]
    return grad_output.mT @ x_t.mT
