"""prune_pack for many matrices in one launch: each program finds its matrix in a table on the device.

Small matrices do not fill a GPU one by one, and each launch costs the host time. The blocks of all matrices lie along
one axis of the grid, matrix by matrix, each row of blocks by row of blocks, as in a launch of its own.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from semisparse import masks
from semisparse.formats.layout import MetadataLayout
from semisparse.kernels import prune_pack
from semisparse.kernels.launcher import Launcher
from semisparse.kernels.pack_table import ENTRY, Matrix, check_members, write_table
from semisparse.kernels.packed_metadata import block_groups, block_rows
from semisparse.kernels.prune_pack import Block, best_block, check_block, constants_of, pack_block

HOPPER_BLOCK = Block(tile_rows=16, pairs=8, warps=4, registers=96)
"""For 16-bit matrices on sm90: the addresses from the table take registers, so prune_pack's block would spill."""


@triton.jit
def blocks_in(size, unit: tl.constexpr):
    """Blocks of `unit` that cover `size`."""
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
    row_blocks, row_blocks_t = blocks_in(rows_padded, block_rows(BITS)), blocks_in(columns, block_rows(BITS))
    blocks, blocks_t = blocks_in(columns // 4, block_groups(BITS)), blocks_in(rows_padded // 4, block_groups(BITS))
    across = blocks_in(columns, 8 * PAIRS)
    local = program - tl.load(entry + 9).to(tl.int32)
    down = local // across
    pack_block(
        matrix, codes, scale, entry, entry, rows, rows_padded, columns, stride,
        row_blocks, blocks, row_blocks_t, blocks_t, down, local - down * across,
        IN, OUT, MASK, TRANSPOSED, BITS, PADDING, TILE_ROWS, PAIRS, EVEN, WIDE, NATIVE, True,
    )  # fmt: skip


def _best_block(dtype: torch.dtype, index: int) -> Block:
    block = best_block(dtype, index)
    return HOPPER_BLOCK if block is prune_pack.HOPPER_BLOCK else block


class Batch:
    """Matrices that are packed in one launch, again and again, from and to the same addresses.

    On CUDA, building one waits until its table is written, though not for other work of the device. From then on every
    stream and every captured graph may launch it.

    Args:
        members: All of one stored dtype, on one device, and each as takes() wants it.
        dtype: Of the packed values, fp16 or bf16.
        layout: Where the metadata goes.
        mask: As prune_pack.launch's.
        block: What one program covers; None takes what is fastest for the device and dtype.

    Raises:
        ShapeError, TensorError, ConfigError: As check_members.
    """

    def __init__(
        self,
        members: Sequence[Matrix],
        dtype: torch.dtype,
        layout: MetadataLayout,
        mask: str,
        block: Block | None = None,
    ) -> None:
        first, chosen = members[0].matrix, masks.get(mask)
        codes, both = members[0].codes is not None, members[0].packed_t is not None
        index = self._index = first.get_device()
        block = block or _best_block(first.dtype, index)
        check_block(block, layout)
        check_members(members, dtype, layout, chosen)
        # A stream of its own, so that nothing but the copies is waited for.
        with torch.cuda.stream(table_stream(index)) if index >= 0 else nullcontext():
            self._table, self._member_of, even = write_table(members, 4 * block.tile_rows, 8 * block.pairs)
        self._streams: set[int] = set()
        types, programs = (first.dtype, dtype), len(self._member_of)
        self._start = _prepare(programs, types, mask, codes, both, layout, block, even, index >= 0)

    def launch(self) -> None:
        """Pack all matrices. Asynchronous, on the current stream of their device."""
        if self._index >= 0:
            note_stream(self._index, self._streams, (self._table, self._member_of))
        self._start(self._index, self._table, self._member_of)


def note_stream(index: int, noted: set[int], tables: Sequence[Tensor]) -> None:
    """Keep tables' memory, once it is freed, from being used again before the current stream is done with it.

    Args:
        index: Of the CUDA device.
        noted: Streams that the tables know already; the current one is added.
        tables: Tensors on the device.
    """
    if torch._C._cuda_getCurrentRawStream(index) in noted:
        return
    stream = torch.cuda.current_stream(index)
    for tensor in tables:
        tensor.record_stream(stream)
    noted.add(stream.cuda_stream)


@lru_cache
def table_stream(index: int) -> torch.cuda.Stream:
    """The stream of device index on which tables are written."""
    return torch.cuda.Stream(index)


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
