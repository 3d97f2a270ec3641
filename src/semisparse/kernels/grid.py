"""How many programs a kernel starts and which block of a matrix each handles, within what CUDA can start.

Of the three axes of a grid only x is long: 2^31 - 1 programs, where y and z end at 65,535, which a million tokens
exceed. So all programs lie along x. They go through a matrix row of blocks by row of blocks, as a grid of
columns x rows would, so neighbours in time share rows and with them the cache lines of the transpose.
"""

import triton
import triton.language as tl

from semisparse.errors import ShapeError

LIMITS = (2**31 - 1, 65_535, 65_535)
"""Most programs along x, y and z that CUDA starts, on every GPU with sparse tensor cores."""

LARGEST_SIZE = 2**31 - 4096
"""Most rows or columns: kernels count both in 32 bits, up to the end of a program's block behind the matrix."""

INT32_END = 2**31
"""Offsets from here on need 64 bits."""


def grid_of(rows: int, columns: int, height: int, width: int) -> tuple[int, int, int]:
    """One program for each height x width block of a matrix; block_at finds a program's block.

    Raises ShapeError where the matrix has more rows or columns than kernels can count, or more blocks than CUDA starts.
    """
    if max(rows, columns) > LARGEST_SIZE:
        raise ShapeError(
            f"matrix is {rows} x {columns}; a kernel takes at most {LARGEST_SIZE} rows or columns: split the matrix"
        )
    grid = (-(-rows // height) * -(-columns // width), 1, 1)
    check_grid(grid)
    return grid


def check_grid(grid: tuple[int, int, int]) -> None:
    """Raise ShapeError unless CUDA can start such a grid; it would refuse with a bare 'invalid argument'."""
    for axis, size, limit in zip("xyz", grid, LIMITS, strict=True):
        if size > limit:
            raise ShapeError(
                f"grid={grid} has {size} programs along {axis}; CUDA starts at most {limit}: split the matrix"
            )


@triton.jit
def block_at(columns, WIDTH: tl.constexpr):
    """Row and column, in blocks, of this program's block of a matrix with that many columns."""
    across = (columns + WIDTH - 1) // WIDTH
    row = tl.program_id(0) // across
    return row, tl.program_id(0) - row * across
