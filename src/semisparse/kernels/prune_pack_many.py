"""prune_pack for many matrices in one launch: each program finds its matrix in a table on the device.

Small matrices do not fill a GPU one by one, and each launch costs the host time. The blocks of all matrices lie along
one axis of the grid, matrix by matrix, each row of blocks by row of blocks, as in a launch of its own.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from semisparse import masks
from semisparse.formats.layout import ALIGNMENT, PACKED_DTYPES, SPARSE_MULTIPLE, MetadataLayout
from semisparse.kernels import prune_pack
from semisparse.kernels.grid import INT32_END, LARGEST_SIZE
from semisparse.kernels.launch_checks import READ_DTYPES, check_buffer, check_choice, check_held
from semisparse.kernels.launcher import Launcher
from semisparse.kernels.packed_metadata import block_groups, block_rows
from semisparse.kernels.prune_pack import Block, best_block, check_block, constants_of, pack_block

ENTRY = 16
"""64-bit words of a matrix in the table, so many that every entry is aligned: where its five tensors lie, four sizes as
prune_pack takes them, the number of the matrix's first program, and zeros."""


HOPPER_BLOCK = Block(tile_rows=16, pairs=8, warps=4, registers=96)
"""For 16-bit matrices on sm90: the addresses from the table take registers, so prune_pack's block would spill."""


class Matrix(NamedTuple):
    """One matrix of a launch, with what prune_pack.launch takes for it.

    Attributes:
        matrix: R x C, as prune_pack.launch takes it; rows 16-byte aligned.
        packed: Its buffer.
        packed_t: Its transpose's buffer, for all matrices of a launch or for none.
        codes: Tile codes, for all or none.
        scale: For mask "soft".
    """

    matrix: Tensor
    packed: Tensor
    packed_t: Tensor | None
    codes: Tensor | None = None
    scale: Tensor | None = None


@triton.jit
def _up(size, unit: tl.constexpr):
    return (size + unit - 1) // unit


@triton.jit
def prune_pack_many(
    table, member_of,
    IN: tl.constexpr, OUT: tl.constexpr, MASK: tl.constexpr, TRANSPOSED: tl.constexpr, BITS: tl.constexpr,
    PADDING: tl.constexpr, TILE_ROWS: tl.constexpr, PAIRS: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr,
    NATIVE: tl.constexpr, ENTRY: tl.constexpr,
):  # fmt: skip
    """The kernel. table: int64, ENTRY words for each matrix; member_of: int32, the matrix of each program.

    The width of loads and stores depends on Triton's knowledge of which addresses and sizes are multiples of 16, which
    plain numbers from a table lose. Therefore a place is a distance from its entry, an aligned pointer, and places and
    sizes are in units that the kernel multiplies by.
    """
    program = tl.program_id(0)
    entry = table + tl.load(member_of + program).to(tl.int64) * ENTRY
    matrix = entry + tl.load(entry) * 2
    codes = entry.to(tl.pointer_type(tl.int16)) + tl.load(entry + 1) * 8
    scale = entry.to(tl.pointer_type(tl.float32)) + tl.load(entry + 2)
    rows = tl.load(entry + 5).to(tl.int32)
    rows_padded = tl.load(entry + 6).to(tl.int32) * 16
    columns = tl.load(entry + 7).to(tl.int32) * 16
    stride = tl.load(entry + 8).to(tl.int32) * 2
    # Not from the table: values that are computed again where they are used hold no registers until then.
    row_blocks, row_blocks_t = _up(rows_padded, block_rows(BITS)), _up(columns, block_rows(BITS))
    blocks, blocks_t = _up(columns // 4, block_groups(BITS)), _up(rows_padded // 4, block_groups(BITS))
    across = _up(columns, 8 * PAIRS)
    local = program - tl.load(entry + 9).to(tl.int32)
    down = local // across
    pack_block(
        matrix, codes, scale, entry, entry, rows, rows_padded, columns, stride,
        row_blocks, blocks, row_blocks_t, blocks_t, down, local - down * across,
        IN, OUT, MASK, TRANSPOSED, BITS, PADDING, TILE_ROWS, PAIRS, EVEN, WIDE, NATIVE, True,
    )  # fmt: skip


def takes(matrix: Tensor, dtype: torch.dtype, mask: masks.Mask) -> bool:
    """Whether a matrix can be part of a launch: its rows are read where they lie, and offsets fit into 32 bits."""
    if matrix.dim() != 2 or matrix.dtype not in READ_DTYPES or dtype not in PACKED_DTYPES or not matrix.numel():
        return False
    rows, columns = matrix.shape
    stride = matrix.stride(0) * matrix.itemsize
    return (
        mask.chosen_while_packing
        and not (rows % SPARSE_MULTIPLE or columns % SPARSE_MULTIPLE or stride % ALIGNMENT)
        and matrix.stride(1) == 1
        and max(rows, columns) <= LARGEST_SIZE
        and rows * max(stride // 8, columns // 4) < INT32_END
        and columns * rows // 4 < INT32_END
        and not matrix.data_ptr() % ALIGNMENT
    )


def _best_block(dtype: torch.dtype, index: int) -> Block:
    block = best_block(dtype, index)
    return HOPPER_BLOCK if block is prune_pack.HOPPER_BLOCK else block


class Batch:
    """Matrices that are packed in one launch, again and again, from and to the same addresses.

    Args:
        members: All of one stored dtype, on one device, and each as takes() wants it.
        dtype: Of the packed values, fp16 or bf16.
        layout: Where the metadata goes.
        mask: As prune_pack.launch's.
        block: What one program covers; None takes what is fastest for the device and dtype.

    Raises:
        ShapeError, TensorError, ConfigError: As prune_pack.launch.
    """

    def __init__(
        self,
        members: Sequence[Matrix],
        dtype: torch.dtype,
        layout: MetadataLayout,
        mask: str,
        block: Block | None = None,
    ) -> None:
        first, chosen = members[0], masks.get(mask)
        self._index = first.matrix.get_device()
        block = block or _best_block(first.matrix.dtype, self._index)
        check_choice(chosen, first.codes is not None, first.scale is not None)
        check_block(block, layout)
        device = first.matrix.device
        self.table = torch.empty(len(members), ENTRY, dtype=torch.int64, device=device)
        words: list[list[int]] = []
        programs: list[int] = []
        even = True
        for number, member in enumerate(members):
            place = self.table[number].data_ptr()
            entry, count, whole = _entry(member, layout, block, sum(programs), place)
            words.append(entry)
            programs.append(count)
            even = even and whole
        # From pinned memory, so that building the table does not wait for the device.
        pinned = self._index >= 0
        self.table.copy_(torch.tensor(words, dtype=torch.int64, pin_memory=pinned), non_blocking=True)
        numbers = torch.arange(len(members), dtype=torch.int32)
        member_of = torch.repeat_interleave(numbers, torch.tensor(programs))
        self.member_of = (member_of.pin_memory() if pinned else member_of).to(device, non_blocking=True)
        types, transposed = (first.matrix.dtype, dtype), first.packed_t is not None
        self._start = _prepare(
            sum(programs), types, mask, first.codes is not None, transposed, layout, block, even, self._index >= 0
        )

    def launch(self) -> None:
        """Pack all matrices. Asynchronous, on the current stream of their device."""
        self._start(self._index, self.table, self.member_of)


def _entry(
    member: Matrix, layout: MetadataLayout, block: Block, first: int, origin: int
) -> tuple[list[int], int, bool]:
    """A matrix's words in the table, its number of programs, and whether they all lie inside the matrix."""
    matrix, packed, packed_t, codes, scale = member
    rows, columns = matrix.shape
    check_held(codes, scale, rows, columns)
    check_buffer("packed", packed, rows, columns, layout)
    if packed_t is not None:
        check_buffer("packed_t", packed_t, columns, rows, layout)
    height, width = 4 * block.tile_rows, 8 * block.pairs
    across, down = -(-columns // width), -(-rows // height)
    tensors = (matrix, codes, scale, packed, packed_t)
    units = (ALIGNMENT, ALIGNMENT, 4, ALIGNMENT, ALIGNMENT)
    places = [0 if t is None else (t.data_ptr() - origin) // unit for t, unit in zip(tensors, units, strict=True)]
    sizes = [rows, rows // 16, columns // 16, matrix.stride(0) * matrix.itemsize // 16]
    return (
        [*places, *sizes, first, *[0] * (ENTRY - 10)],
        across * down,
        not (rows % height or columns % width),
    )


@lru_cache(4096)
def _prepare(
    programs: int,
    types: tuple[torch.dtype, torch.dtype],
    mask: str,
    given_codes: bool,
    transposed: bool,
    layout: MetadataLayout,
    block: Block,
    even: bool,
    native: bool,
) -> Launcher:
    constants = constants_of(types, masks.get(mask), given_codes, transposed, layout, block, even, False, native)
    return Launcher(
        prune_pack_many,
        (programs, 1, 1),
        (),
        (*constants, ENTRY),
        num_warps=block.warps,
        maxnreg=block.registers,
    )
