"""How many programs a kernel starts and which block of a matrix each handles, within the limits of CUDA.

Of the three axes of a grid only x is long: 2^31 - 1 programs. y and z end at 65,535, which a million tokens exceed. A
matrix with more rows of blocks than that gets a *flat* grid, all programs along x. Both kinds go through the matrix row
of blocks by row of blocks, so programs that run at the same time share cache lines in both. In a flat grid finding its
block costs a program registers (unpack takes 40 instead of 32, the pack kernel spills), so only tall matrices get one.
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


def grid_of(rows: int, columns: int, height: int, width: int, flat: bool = False) -> tuple[tuple[int, int, int], bool]:
    """A grid with one program per block of a matrix.

    Args:
        rows: Of the matrix.
        columns: Of the matrix.
        height: Rows of a block.
        width: Columns of a block.
        flat: Make the grid flat in any case.

    Returns:
        The grid, and whether it is flat, which block_at must know.

    Raises:
        ShapeError: The matrix has more rows or columns than kernels can count, or more blocks than CUDA starts.
    """
    if max(rows, columns) > LARGEST_SIZE:
        raise ShapeError(
            f"matrix is {rows} x {columns}; a kernel takes at most {LARGEST_SIZE} rows or columns: split the matrix"
        )
    across, down = -(-columns // width), -(-rows // height)
    flat = flat or down > LIMITS[1]
    grid = (across * down, 1, 1) if flat else (across, down, 1)
    check_grid(grid)
    return grid, flat


def check_grid(grid: tuple[int, int, int]) -> None:
    """Raise ShapeError unless CUDA can start such a grid; it would refuse with a bare 'invalid argument'."""
    for axis, size, limit in zip("xyz", grid, LIMITS, strict=True):
        if size > limit:
            raise ShapeError(
                f"grid={grid} has {size} programs along {axis}; CUDA starts at most {limit}: split the matrix"
            )


@triton.jit
def block_at(columns, WIDTH: tl.constexpr, FLAT: tl.constexpr):
    """Row and column, in blocks, of this program's block of a matrix with that many columns."""
    if FLAT:
        across = (columns + WIDTH - 1) // WIDTH
        row = tl.program_id(0) // across
        column = tl.program_id(0) - row * across
    else:
        row = tl.program_id(1)
        column = tl.program_id(0)
    return row, column
