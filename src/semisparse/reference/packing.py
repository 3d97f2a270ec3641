"""Packing a pruned matrix into kept values plus 2-bit positions, and back, in logical order.

A matrix (R x C) packs along its columns into values (R x C/2) and nibbles (R x C/4, uint8). Nibble g of a row describes
columns 4g to 4g + 3: first kept index | second kept index << 2. This is the content of the hardware's format. Where an
engine stores each nibble is the engine's own (formats/layout.py).
"""

import torch
from torch import Tensor

from semisparse.errors import ShapeError, TensorError
from semisparse.pattern import GROUP, KEPT, METADATA_NIBBLES, Packed
from semisparse.reference.masks import check_shape


def pack(matrix: Tensor, mask: Tensor, dtype: torch.dtype | None = None) -> Packed:
    """Pack the entries of matrix that mask keeps. Exact, apart from one rounding to dtype.

    Args:
        matrix: R x C, C a multiple of 4.
        mask: bool, R x C, at most 2 of each 4 along the columns. A group that keeps fewer than 2 is filled up with
            zeros, in the slots that pattern.metadata_nibble gives.
        dtype: Of the packed values. Default: matrix's.

    Raises:
        ShapeError: A group keeps more than 2, or the shapes differ.
        TensorError: mask is not bool.
    """
    rows, columns = check_shape(matrix, tiles=False)
    if mask.dtype != torch.bool:
        raise TensorError(f"mask has dtype {mask.dtype}; use torch.bool")
    if mask.shape != matrix.shape:
        raise ShapeError(f"mask has shape {tuple(mask.shape)}, matrix {tuple(matrix.shape)}; they must be equal")
    groups = mask.reshape(rows, columns // GROUP, GROUP)
    if bool((groups.sum(-1) > KEPT).any()):
        raise ShapeError(f"mask keeps more than {KEPT} of {GROUP} in a group; choose it with reference.masks")
    weights = torch.tensor([1 << j for j in range(GROUP)], device=mask.device)
    table = torch.tensor([nibble or 0 for nibble in METADATA_NIBBLES], dtype=torch.uint8, device=mask.device)
    nibbles = table[(groups * weights).sum(-1)]
    pruned = torch.where(mask, matrix, 0).to(dtype or matrix.dtype).view(rows, columns // GROUP, GROUP)
    return Packed(pruned.gather(-1, _slots(nibbles)).view(rows, columns // 2), nibbles)


def unpack(packed: Packed) -> Tensor:
    """The pruned matrix (R x C, contiguous, zeros where nothing was kept), exact."""
    rows, groups = packed.nibbles.shape
    values = packed.values.view(rows, groups, KEPT)
    out = torch.zeros(rows, groups, GROUP, dtype=values.dtype, device=values.device)
    return out.scatter_(-1, _slots(packed.nibbles), values).view(rows, groups * GROUP)


def _slots(nibbles: Tensor) -> Tensor:
    """Column of each slot within its group: (R, C/4, 2), int64."""
    return torch.stack([nibbles & 3, nibbles >> 2], dim=-1).long()
