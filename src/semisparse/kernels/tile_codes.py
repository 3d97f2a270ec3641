"""Which entries of each 4x4 tile are kept, as tile codes and nothing else. One thread a tile; any strides.

For what needs the mask alone: masks frozen for some steps, decay, metrics, and masked dense products.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from semisparse.errors import ConfigError, ShapeError, TensorError
from semisparse.kernels import tiles, words
from semisparse.kernels.launcher import Launcher
from semisparse.pattern import GROUP

TILES = 128
"""Tiles of one program, one for each of its threads."""

_MODES = ("transposable", "row")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit
def tile_codes(
    matrix, codes, tile_rows, tile_columns, row_stride, column_stride, ROW: tl.constexpr, TILES: tl.constexpr
):
    """The kernel. Strides in entries; codes: int16, tile_rows x tile_columns, contiguous."""
    tile = tl.program_id(0).to(tl.int64) * TILES + tl.arange(0, TILES)
    inside = tile < tile_rows.to(tl.int64) * tile_columns
    row, column = 4 * (tile // tile_columns), 4 * (tile % tile_columns)
    start = matrix + row * row_stride + column * column_stride
    scores = ()
    for i in tl.static_range(4):
        for j in tl.static_range(4):
            value = tl.load(start + i * row_stride + j * column_stride, mask=inside, other=0.0)
            scores = scores + (words.score(value.to(tl.float32), False),)
    choice = tiles.best_rows(scores) if ROW else tiles.best_tile(scores)
    tl.store(codes + tile, choice.to(tl.int16), mask=inside)


def launch(matrix: Tensor, codes: Tensor, *, mode: str) -> None:
    """Write the tile codes of matrix (R x C, multiples of 4, any strides) into codes (int16, R/4 x C/4, contiguous).

    Asynchronous, on the current stream of matrix's device. matrix: fp32, fp16 or bf16. mode: "transposable" is bit for
    bit reference.masks.transposable, "row" reference.masks.row. Bit 4 * i + j of a code keeps entry (i, j) of its tile.
    Raises ShapeError, TensorError, ConfigError.
    """
    if mode not in _MODES:
        raise ConfigError(f"mode={mode!r} is not one of {', '.join(map(repr, _MODES))}")
    if matrix.dtype not in _DTYPES or codes.dtype != torch.int16 or not codes.is_contiguous():
        raise TensorError(f"matrix is {matrix.dtype}, codes {codes.dtype}; use fp32, fp16 or bf16, contiguous int16")
    rows, columns = matrix.shape
    if rows % GROUP or columns % GROUP or codes.shape != (rows // GROUP, columns // GROUP):
        raise ShapeError(f"matrix is {rows} x {columns}, codes {tuple(codes.shape)}; there must be one for each tile")
    if codes.numel():
        _prepare(*codes.shape, *matrix.stride(), mode == "row")(matrix.get_device(), matrix, codes)


@lru_cache(4096)
def _prepare(tile_rows: int, tile_columns: int, row_stride: int, column_stride: int, row: bool) -> Launcher:
    grid = (triton.cdiv(tile_rows * tile_columns, TILES), 1, 1)
    return Launcher(tile_codes, grid, (tile_rows, tile_columns, row_stride, column_stride), (row, TILES), num_warps=4)
