"""Choosing which entries of a matrix to keep. All masks are bool, of the matrix's shape, True = kept.

Magnitudes are compared in fp32 (an fp64 matrix is rounded to fp32 for the comparison only). A NaN counts as +Inf, so
that a broken weight is kept and shows in the output. Masks of fp32, fp16 and bf16 are defined bit for bit: the order of
the fp32 sums below is part of the definition.
"""

import torch
from torch import Tensor

from semisparse.errors import ShapeError, TensorError
from semisparse.pattern import GROUP, HALVES, KEPT, ROW_BITS, ROW_CHOICES, complement

FLOAT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def magnitude(matrix: Tensor) -> Tensor:
    """Absolute values in fp32, NaN replaced by +Inf. matrix: any shape, fp64, fp32, fp16 or bf16."""
    check_dtype(matrix)
    return matrix.detach().to(torch.float32).abs().nan_to_num(nan=float("inf"), posinf=float("inf"))


def check_dtype(matrix: Tensor) -> None:
    """Raise TensorError unless matrix is fp64, fp32, fp16 or bf16."""
    if matrix.dtype not in FLOAT_DTYPES:
        raise TensorError(f"matrix has dtype {matrix.dtype}; use one of float64, float32, float16, bfloat16")


def check_shape(matrix: Tensor, *, tiles: bool) -> tuple[int, int]:
    """Rows and columns of a matrix that splits into groups of 4.

    Args:
        matrix: Any tensor.
        tiles: Whether it must split into 4x4 tiles, rather than into groups along the columns only.

    Raises:
        ShapeError: matrix does not have 2 dimensions, or a size is not a multiple of 4.
    """
    if matrix.dim() != 2:
        raise ShapeError(f"matrix has shape {tuple(matrix.shape)}; a mask needs exactly 2 dimensions: flatten it first")
    rows, columns = matrix.shape
    if columns % GROUP or (tiles and rows % GROUP):
        axes = "both sizes" if tiles else "the number of columns"
        raise ShapeError(f"matrix has shape {(rows, columns)}; {axes} must be a multiple of {GROUP}: pad the matrix")
    return rows, columns


def transposable_codes(matrix: Tensor) -> Tensor:
    """For each 4x4 tile of matrix, the transposable tile with the largest sum of magnitudes, of all 90.

    Exact in this order of fp32 sums: pair sums per row; the sum of rows 0 and 1 and of rows 2 and 3; for each of the 19
    column-count vectors the best half (first of equals); the best total (first of equals). The class of masks is that
    of arXiv 2102.08124; the search over column counts is this project's.

    Args:
        matrix: R x C, both multiples of 4, any strides, fp64, fp32, fp16 or bf16.

    Returns:
        int32 tile codes, R/4 x C/4. Bit 4 * i + j of a code is set if entry (i, j) of its tile is kept.

    Raises:
        ShapeError, TensorError: matrix has no such tiles, or is not of a float dtype.
    """
    rows, columns = check_shape(matrix, tiles=True)
    tiles = magnitude(matrix).view(rows // GROUP, GROUP, columns // GROUP, GROUP).permute(1, 3, 0, 2).contiguous()
    pair_sums = [[tiles[i, a] + tiles[i, b] for a, b in ROW_CHOICES] for i in range(GROUP)]
    upper = _best_halves(pair_sums[0], pair_sums[1])
    lower = _best_halves(pair_sums[2], pair_sums[3])
    best_sum = best_code = None
    for counts in HALVES:
        upper_sum, upper_bits = upper[counts]
        lower_sum, lower_bits = lower[complement(counts)]
        total, code = upper_sum + lower_sum, upper_bits | lower_bits << 2 * GROUP
        if best_sum is None or best_code is None:
            best_sum, best_code = total, code
        else:
            best_code = torch.where(total > best_sum, code, best_code)
            best_sum = torch.maximum(best_sum, total)
    assert best_code is not None
    return best_code


def _best_halves(first_row: list[Tensor], second_row: list[Tensor]) -> dict[tuple[int, ...], tuple[Tensor, Tensor]]:
    """For each column-count vector the largest sum of a half and its 8-bit code; of equals the first."""
    best: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}
    for counts, pairs in HALVES.items():
        for upper, lower in pairs:
            total = first_row[upper] + second_row[lower]
            code = ROW_BITS[upper] | ROW_BITS[lower] << GROUP
            if counts in best:
                best_sum, best_code = best[counts]
                best[counts] = torch.maximum(total, best_sum), torch.where(total > best_sum, code, best_code)
            else:
                best[counts] = total, torch.full_like(total, code, dtype=torch.int32)
    return best


def from_codes(codes: Tensor) -> Tensor:
    """The bool mask (R x C) that tile codes (R/4 x C/4, any integer dtype) describe."""
    shifts = torch.arange(GROUP * GROUP, device=codes.device, dtype=torch.int32).view(1, 1, GROUP, GROUP)
    bits = (codes.to(torch.int32)[:, :, None, None] >> shifts & 1).bool()
    return bits.permute(0, 2, 1, 3).reshape(codes.shape[0] * GROUP, codes.shape[1] * GROUP)


def to_codes(mask: Tensor) -> Tensor:
    """int32 tile codes (R/4 x C/4) of a bool mask (R x C); the inverse of from_codes."""
    rows, columns = check_shape(mask, tiles=True)
    bits = mask.view(rows // GROUP, GROUP, columns // GROUP, GROUP).permute(0, 2, 1, 3).to(torch.int32)
    shifts = torch.arange(GROUP * GROUP, device=mask.device, dtype=torch.int32).view(GROUP, GROUP)
    return (bits << shifts).sum(dim=(2, 3), dtype=torch.int32)


def transposable(matrix: Tensor) -> Tensor:
    """Exact transposable mask: each 4x4 tile keeps 2 in every row and column, with the largest sum of magnitudes.

    Args:
        matrix: R x C, both multiples of 4, any strides, fp64, fp32, fp16 or bf16.

    Raises:
        ShapeError, TensorError: matrix has no such tiles, or is not of a float dtype.
    """
    return from_codes(transposable_codes(matrix))


def row(matrix: Tensor) -> Tensor:
    """Row-wise mask: the 2 largest magnitudes of each 4 along the columns; of equals the lower index is kept.

    Args:
        matrix: R x C, C a multiple of 4, any strides, fp64, fp32, fp16 or bf16.

    Raises:
        ShapeError, TensorError: matrix has no such groups, or is not of a float dtype.
    """
    rows, columns = check_shape(matrix, tiles=False)
    groups = magnitude(matrix).reshape(rows, columns // GROUP, GROUP)
    order = groups.argsort(dim=-1, descending=True, stable=True)
    kept = torch.zeros_like(groups, dtype=torch.bool)
    return kept.scatter_(-1, order[..., :KEPT], True).view(rows, columns)


def greedy(matrix: Tensor, *, signed: bool = False) -> Tensor:
    """Greedy 4x4 mask, for comparison only: entries from the largest down, each kept if its row and column have room.

    At most 2:4 along both axes, but not exact: a tile can keep fewer than 8 entries and less magnitude than it could.

    Args:
        matrix: R x C, both multiples of 4, any strides, fp64, fp32, fp16 or bf16.
        signed: Rank entries by value instead of magnitude, as torchao.sparsity.training did by default. Large negative
            weights are then dropped.

    Raises:
        ShapeError, TensorError: matrix has no such tiles, or is not of a float dtype.
    """
    rows, columns = check_shape(matrix, tiles=True)
    scores = magnitude(matrix)
    if signed:
        scores = torch.where(matrix.detach() < 0, -scores, scores)
    tiles = scores.view(rows // GROUP, GROUP, columns // GROUP, GROUP).permute(0, 2, 1, 3).reshape(-1, GROUP**2)
    order = tiles.argsort(dim=-1, descending=True, stable=True)
    kept = torch.zeros(len(tiles), GROUP, GROUP, dtype=torch.bool, device=matrix.device)
    every = torch.arange(len(tiles), device=matrix.device)
    for rank in range(GROUP**2):
        i, j = order[:, rank] // GROUP, order[:, rank] % GROUP
        room = (kept[every, i].sum(-1) < KEPT) & (kept[every, :, j].sum(-1) < KEPT)
        kept[every, i, j] = room
    return kept.view(rows // GROUP, columns // GROUP, GROUP, GROUP).permute(0, 2, 1, 3).reshape(rows, columns)
