"""Choose what each 4x4 tile keeps and write it as tile codes only. One thread per tile; any strides.

For users of the mask alone: masks held for some steps, decay, metrics, and masked dense products.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from semisparse import masks
from semisparse.errors import ShapeError, TensorError
from semisparse.kernels import packed_values, tile_masks
from semisparse.kernels.launch_checks import READ_DTYPES
from semisparse.kernels.launcher import Launcher
from semisparse.pattern import GROUP

TILES = 128
"""Tiles of one program, one per thread."""

_TRANSPOSABLE = tl.constexpr(masks.get("transposable").constant)
_ROW = tl.constexpr(masks.get("row").constant)
_SOFT = tl.constexpr(masks.get("soft").constant)
_SIGNED_GREEDY = tl.constexpr(masks.get("signed_greedy").constant)


@triton.jit
def tile_codes(
    matrix, codes, tile_rows, tile_columns, row_stride, column_stride, MASK: tl.constexpr, TILES: tl.constexpr
):
    """The kernel. Strides in entries; codes: int16, tile_rows x tile_columns, contiguous."""
    tile = tl.program_id(0).to(tl.int64) * TILES + tl.arange(0, TILES)
    tile_row, tile_column = tile // tile_columns, tile % tile_columns
    inside = tile_row < tile_rows
    line = matrix + 4 * tile_row * row_stride + 4 * tile_column * column_stride
    scores, keys = (), ()
    for _ in tl.static_range(4):
        at = line
        for _ in tl.static_range(4):
            value = tl.load(at, mask=inside, other=0.0).to(tl.float32)
            score = packed_values.score(value, False)
            scores, keys = scores + (score,), keys + (tile_masks.rank_key(value, score, MASK == _SIGNED_GREEDY),)
            at += column_stride  # step by step: three times a stride may need 64 bits where the stride needs 32
        line += row_stride
    if MASK == _TRANSPOSABLE:
        choice = tile_masks.best_tile(scores)
    elif MASK == _ROW or MASK == _SOFT:
        choice = tile_masks.best_rows(scores)
    else:
        choice = tile_masks.best_greedy(keys)
    tl.store(codes + tile, choice.to(tl.int16), mask=inside)


def launch(matrix: Tensor, codes: Tensor, *, mask: str) -> None:
    """Write the tile codes of a matrix. Asynchronous, on the current stream of its device.

    Args:
        matrix: R x C, multiples of 4, any strides, fp32, fp16 or bf16.
        codes: int16, R/4 x C/4, contiguous. Bit 4 * i + j of a code keeps entry (i, j) of its tile.
        mask: Any of masks.MASKS; the choice equals that of its choose bit for bit.

    Raises:
        ShapeError: The sizes do not fit.
        TensorError: A dtype or a memory layout does not fit.
        ConfigError: The mask is unknown.
    """
    constant = masks.get(mask).constant
    if matrix.dtype not in READ_DTYPES or codes.dtype != torch.int16 or not codes.is_contiguous():
        raise TensorError(f"matrix is {matrix.dtype}, codes {codes.dtype}; use fp32, fp16 or bf16, contiguous int16")
    rows, columns = matrix.shape
    if rows % GROUP or columns % GROUP or codes.shape != (rows // GROUP, columns // GROUP):
        raise ShapeError(f"matrix is {rows} x {columns}, codes {tuple(codes.shape)}; there must be one per tile")
    if codes.numel():
        _prepare(*codes.shape, *matrix.stride(), constant, matrix.dtype)(matrix.get_device(), matrix, codes)


@lru_cache(4096)
def _prepare(
    tile_rows: int, tile_columns: int, row_stride: int, column_stride: int, constant: int, dtype: torch.dtype
) -> Launcher:
    """dtype is only a key: the kernel is compiled for it."""
    grid = (triton.cdiv(tile_rows * tile_columns, TILES), 1, 1)
    sizes = (tile_rows, tile_columns, row_stride, column_stride)
    return Launcher(tile_codes, grid, sizes, (constant, TILES), num_warps=4)
