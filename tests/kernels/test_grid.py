"""Every launch, however tall the matrix, has a grid that CUDA can start, and a typed error says where none has."""

import pytest
import torch

from semisparse.errors import ShapeError
from semisparse.formats.layout import SM90_16BIT
from semisparse.kernels import bias, prune_pack, quantise, rescale, tile_codes, unpack
from semisparse.kernels.grid import LARGEST_SIZE, check_grid, grid_of
from semisparse.kernels.launcher import Launcher
from semisparse.kernels.prune_pack import DEFAULT_BLOCK, HOPPER_BLOCK

BF16 = torch.bfloat16
X, YZ = 2**31 - 1, 65_535  # CUDA's limits, from its programming guide
TALL = (1_048_560, 1_048_576, 4_194_240, 4_194_304, 4_194_368, 67_108_864, LARGEST_SIZE // 64 * 64)


def pack(rows, columns, block=DEFAULT_BLOCK):
    types, sizes = (BF16, BF16), (rows, rows, columns, columns // 4)
    return prune_pack._prepare(sizes, types, "transposable", (False, False), (True, True), SM90_16BIT, block, False)[0]


def round_to_e4m3(rows, columns):
    sizes = rows, rows, columns, columns // 8, 512
    return quantise._prepare(sizes, BF16, (True, True), quantise.BLOCK, False)


PREPARED = {
    "add_bias": lambda rows, columns: bias._prepare(rows, columns, BF16),
    "rescale": lambda rows, columns: rescale._prepare(rows, columns, (BF16, BF16, None), False),
    "quantise": round_to_e4m3,
    "unpack": lambda rows, columns: unpack._prepare(rows, columns, SM90_16BIT, 2),
    "prune_pack": pack,
    "prune_pack on Hopper": lambda rows, columns: pack(rows, columns, HOPPER_BLOCK),
    "tile_codes": lambda rows, columns: tile_codes._prepare(rows // 4, columns // 4, columns, 1, 2, BF16),
}
BLOCK = {"quantise": (4 * quantise.BLOCK.fours, quantise.BLOCK.columns), "rescale": (rescale.ROWS, rescale.COLUMNS)}
BLOCK |= {"add_bias": (16, 512), "unpack": (16, 256), "prune_pack": (64, 64), "prune_pack on Hopper": (64, 128)}


@pytest.mark.parametrize("columns", [16, 1024])
@pytest.mark.parametrize("rows", TALL)
@pytest.mark.parametrize("kernel", PREPARED)
def test_a_tall_matrix_gets_a_grid_that_cuda_can_start(kernel, rows, columns):
    grid = PREPARED[kernel](rows, columns)._grid
    assert 1 <= grid[0] <= X and 1 <= grid[1] <= YZ and grid[2] == 1
    if kernel in BLOCK:
        height, width = BLOCK[kernel]
        assert grid[0] * grid[1] == -(-rows // height) * -(-columns // width)


@pytest.mark.parametrize("kernel", BLOCK)
def test_usual_sizes_keep_their_grid_whose_kernels_take_fewer_registers(kernel):
    height, width = BLOCK[kernel]
    launcher = PREPARED[kernel](16384, 4096)
    assert launcher._grid == (4096 // width, 16384 // height, 1)
    assert PREPARED[kernel](YZ * height, 4096)._grid == (4096 // width, YZ, 1)
    assert PREPARED[kernel]((YZ + 1) * height, 4096)._grid == ((YZ + 1) * 4096 // width, 1, 1)


@pytest.mark.parametrize("kernel", BLOCK)
@pytest.mark.parametrize("shape", [(2**31, 16), (16, 2**31), (LARGEST_SIZE + 64, 16)], ids=str)
def test_more_rows_or_columns_than_32_bits_can_count_are_refused(kernel, shape):
    with pytest.raises(ShapeError, match=f"matrix is .* a kernel takes at most {LARGEST_SIZE} rows or columns: split"):
        PREPARED[kernel](*shape)


def test_more_blocks_than_cuda_starts_are_refused():
    with pytest.raises(ShapeError, match=r"programs along x; CUDA starts at most 2147483647: split the matrix"):
        grid_of(2**30, 2**30, 16, 512)
    with pytest.raises(ShapeError, match="along x"):
        PREPARED["tile_codes"](2**33, 2**10)


@pytest.mark.parametrize(("axis", "grid"), [("x", (X + 1, 1, 1)), ("y", (1, YZ + 1, 1)), ("z", (1, 1, YZ + 1))])
def test_a_launcher_refuses_a_grid_that_cuda_cannot_start(axis, grid):
    with pytest.raises(ShapeError, match=rf"grid=\({grid[0]}, {grid[1]}, {grid[2]}\) has \d+ programs along {axis}"):
        Launcher(None, grid, (), ())
    check_grid(tuple(min(size, limit) for size, limit in zip(grid, (X, YZ, YZ), strict=True)))


def test_an_empty_matrix_needs_no_program():
    assert grid_of(0, 64, 16, 512) == ((1, 0, 1), False)
    out = torch.empty(0, 64, dtype=torch.float16)
    bias.launch(out, torch.ones(64, dtype=torch.float16))


@pytest.mark.parametrize(
    ("sizes", "wide"),
    [
        ((64, 64, 4096, 1024), False),
        ((64, 64, 4096, 2**25 - 1), False),
        ((64, 64, 4096, 2**25), True),  # 64 rows of 2^25 words
        ((64, 64, 2**27 - 64, 0), False),
        ((64, 64, 2**27, 0), True),  # as many words in 64 packed rows; a row that is expanded has stride 0
        ((4_194_240, 4_194_240, 64, 16), False),
        ((4_194_241, 4_194_256, 64, 16), True),
    ],
    ids=str,
)
def test_64_bits_are_taken_where_a_program_needs_them_and_nowhere_else(sizes, wide):
    types = (BF16, BF16)
    launcher = prune_pack._prepare(
        sizes, types, "row", (False, False), (True, False), SM90_16BIT, DEFAULT_BLOCK, False
    )[0]
    names = prune_pack.prune_pack.arg_names
    assert launcher._constants[names.index("WIDE") - len(names)] is wide
    assert launcher._options["maxnreg"] == (None if wide else DEFAULT_BLOCK.registers)


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0), (10, 0), (12, 0)])
def test_only_16_bit_matrices_on_hopper_get_its_block(monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    prune_pack.best_block.cache_clear()
    try:
        for dtype in (torch.float32, torch.float16, BF16):
            hopper = capability == (9, 0) and dtype != torch.float32
            assert prune_pack.best_block(dtype, 0) is (HOPPER_BLOCK if hopper else DEFAULT_BLOCK)
            assert prune_pack.best_block(dtype, -1) is DEFAULT_BLOCK
    finally:
        prune_pack.best_block.cache_clear()
