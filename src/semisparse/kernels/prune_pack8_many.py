"""prune_pack8 for many matrices: their scales by amax_many, then one launch that packs all of them.

Each program finds its matrix in a table on the device, as in prune_pack_many.py, and the scale in the vector that
amax_many's last kernel wrote.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import lru_cache

import torch
import triton
import triton.language as tl

from semisparse import masks
from semisparse.formats.layout import FP8, MetadataLayout
from semisparse.kernels import amax_many, e4m3
from semisparse.kernels.launcher import Launcher
from semisparse.kernels.pack_table import ENTRY, Matrix, check_members, write_table
from semisparse.kernels.packed_metadata import block_groups, block_rows
from semisparse.kernels.prune_pack import Block
from semisparse.kernels.prune_pack8 import BLOCK, check_block8, constants_of8, pack_block8
from semisparse.kernels.prune_pack_many import blocks_in, note_stream, table_stream

LIMITED_BLOCK = BLOCK._replace(registers=128)
"""For transposable masks on sm89 and sm90, where addresses from the table would give fp32 programs 165 registers, so
that a multiprocessor runs three instead of four. Nothing spills with this limit; on sm100 some would."""


@triton.jit
def prune_pack8_many(
    table, member_of, scales,
    IN: tl.constexpr, MASK: tl.constexpr, BITS: tl.constexpr, PADDING: tl.constexpr,
    TILE_ROWS: tl.constexpr, PAIRS: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr,
    NATIVE: tl.constexpr, CONVERTS: tl.constexpr, TRANSPOSED: tl.constexpr, ENTRY: tl.constexpr,
):  # fmt: skip
    """The kernel. table and member_of: as prune_pack_many's. scales: fp32, one for each matrix.

    A scale is a power of two, so its inverse is the multiplier, exactly. The first program of a matrix also stores the
    scale where the entry says.
    """
    program = tl.program_id(0)
    member = tl.load(member_of + program).to(tl.int64)
    entry = table + member * ENTRY
    matrix = entry + tl.load(entry) * 2
    codes = entry.to(tl.pointer_type(tl.int16)) + tl.load(entry + 1) * 8
    packed = entry.to(tl.pointer_type(tl.uint8)) + tl.load(entry + 3) * 16
    packed_t = None
    if TRANSPOSED:
        packed_t = entry.to(tl.pointer_type(tl.uint8)) + tl.load(entry + 4) * 16
    rows, columns = tl.load(entry + 6).to(tl.int32) * 16, tl.load(entry + 7).to(tl.int32) * 16
    stride = tl.load(entry + 8).to(tl.int32) * 2
    row_blocks, row_blocks_t = blocks_in(rows, block_rows(BITS)), blocks_in(columns, block_rows(BITS))
    blocks, blocks_t = blocks_in(columns // 4, block_groups(BITS)), blocks_in(rows // 4, block_groups(BITS))
    across = blocks_in(columns, 8 * PAIRS)
    local = program - tl.load(entry + 9).to(tl.int32)
    down = local // across
    scale = tl.load(scales + member)
    tl.store(entry.to(tl.pointer_type(tl.float32)) + tl.load(entry + 2), scale, mask=local == 0)
    pack_block8(
        matrix, codes, e4m3.inverse(scale), packed, packed_t, rows, columns, stride,
        row_blocks, blocks, row_blocks_t, blocks_t, down, local - down * across,
        IN, MASK, BITS, PADDING, TILE_ROWS, PAIRS, EVEN, WIDE, NATIVE, CONVERTS,
    )  # fmt: skip


@lru_cache
def best_block8(index: int) -> Block:
    """The block to choose transposable masks on CUDA device index; -1 is the CPU's interpreter."""
    limited = index >= 0 and torch.cuda.get_device_capability(index) in ((8, 9), (9, 0))
    return LIMITED_BLOCK if limited else BLOCK


class Batch:
    """Matrices that are packed in e4m3 together, again and again, from and to the same addresses.

    On CUDA, building one waits until its tables are written, though not for other work of the device. From then on
    every stream and every captured graph may launch it.

    Args:
        members: All of one stored dtype, on one device, and each as takes() wants it. Their scales are written.
        layout: Where the metadata goes.
        mask: As prune_pack8.launch's.
        block: What one program covers; None takes what is best for the device.

    Raises:
        ShapeError, TensorError, ConfigError: As check_members and prune_pack8.launch.
    """

    def __init__(
        self, members: Sequence[Matrix], layout: MetadataLayout, mask: str, block: Block | None = None
    ) -> None:
        first, chosen = members[0].matrix, masks.get(mask)
        codes, both = members[0].codes is not None, members[0].packed_t is not None
        index = self._index = first.get_device()
        block = block or (best_block8(index) if chosen.both_ways and not codes else BLOCK)
        check_block8(block, layout)
        check_members(members, FP8, layout, chosen)
        self._scales = first.new_empty(len(members), dtype=torch.float32)
        self._amax = amax_many.Batch([member.matrix.detach() for member in members], self._scales)
        # A stream of its own, so that nothing but the copies is waited for.
        with torch.cuda.stream(table_stream(index)) if index >= 0 else nullcontext():
            self._table, self._member_of, even = write_table(members, 4 * block.tile_rows, 8 * block.pairs)
        self._streams: set[int] = set()
        self._start = _prepare(len(self._member_of), first.dtype, mask, codes, both, layout, block, even, index)

    def launch(self) -> None:
        """Pack all matrices, by three kernels. Asynchronous, on the current stream of their device."""
        if self._index >= 0:
            note_stream(self._index, self._streams, (self._table, self._member_of, self._scales))
        self._amax.launch()
        self._start(self._index, self._table, self._member_of, self._scales)


@lru_cache(4096)
def _prepare(
    programs: int,
    dtype: torch.dtype,
    mask: str,
    given_codes: bool,
    transposed: bool,
    layout: MetadataLayout,
    block: Block,
    even: bool,
    index: int,
) -> Launcher:
    constants = constants_of8(dtype, masks.get(mask), given_codes, layout, block, even, False, index)
    return Launcher(
        prune_pack8_many,
        (programs, 1, 1),
        (),
        (*constants, transposed, ENTRY),
        num_warps=block.warps,
        maxnreg=block.registers,
    )
