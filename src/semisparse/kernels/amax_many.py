"""The scales of many matrices by two launches: amax for all of them, then scale_of.

Each program finds its matrix in a table on the device, as in prune_pack_many.py. Small matrices do not fill a GPU one
by one, and each launch costs the host time.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from semisparse.errors import ShapeError, TensorError
from semisparse.formats.layout import ALIGNMENT
from semisparse.kernels import amax
from semisparse.kernels.launcher import Launcher
from semisparse.kernels.prune_pack_many import note_stream, table_stream

ENTRY = 8
"""64-bit words of a matrix in the table: how far its start lies from the entry, in 16 bytes, its extent (rows, columns
and stride, as amax.extent), blocks, first program, programs, and a zero."""


@triton.jit
def amax_many(
    table, member_of, partials,
    TYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ENTRY: tl.constexpr,
):  # fmt: skip
    """The kernel. table: int64, ENTRY words for each matrix; member_of: int32, the matrix of each program."""
    program = tl.program_id(0)
    entry = table + tl.load(member_of + program).to(tl.int64) * ENTRY
    matrix = entry.to(tl.pointer_type(tl.int32)) + tl.load(entry) * 4
    rows, columns = tl.load(entry + 1).to(tl.int32), tl.load(entry + 2).to(tl.int32)
    stride, blocks = tl.load(entry + 3).to(tl.int32), tl.load(entry + 4).to(tl.int32)
    first, step = program - tl.load(entry + 5).to(tl.int32), tl.load(entry + 6).to(tl.int32)
    found = amax.partial_maximum(matrix, rows, columns, stride, first, blocks, step, TYPE, ROWS, COLUMNS)
    tl.store(partials + program, found)


class Batch:
    """Matrices whose scales are computed together, again and again, at the same addresses.

    On CUDA, building one waits until its table is written, though not for other work of the device. From then on every
    stream and every captured graph may launch it.

    Args:
        matrices: M x K each, as amax.readable gives them, of one dtype and on one device.
        scales: fp32, one for each matrix, contiguous.

    Raises:
        ShapeError, TensorError: As amax.launch; or matrices differ in dtype or device, or scales do not fit.
    """

    def __init__(self, matrices: Sequence[Tensor], scales: Tensor) -> None:
        first = matrices[0]
        for matrix in matrices:
            amax.check_readable(matrix)
            if matrix.dtype != first.dtype or matrix.device != first.device:
                raise TensorError(
                    f"matrix is {matrix.dtype} on {matrix.device}, the first {first.dtype} on {first.device}: use a "
                    "batch for each"
                )
        if scales.dtype != torch.float32 or not scales.is_contiguous():
            raise TensorError(f"scales is {scales.dtype}; it must be contiguous float32")
        if scales.shape != (len(matrices),):
            raise ShapeError(f"scales has shape {tuple(scales.shape)}; it must be ({len(matrices)},)")
        self._index, self._scales = first.get_device(), scales
        # A stream of its own, so that nothing but the copies is waited for.
        with torch.cuda.stream(table_stream(self._index)) if self._index >= 0 else nullcontext():
            self._table, self._member_of, self._starts = _write_table(matrices)
        self._streams: set[int] = set()
        self._start = _prepare(len(self._member_of), first.dtype)
        self._finish = _prepare_scales(len(matrices))

    def launch(self) -> None:
        """Compute all scales. Asynchronous, on the current stream of their device."""
        if self._index >= 0:
            note_stream(self._index, self._streams, (self._table, self._member_of, self._starts))
        partials = torch.empty_like(self._member_of)
        self._start(self._index, self._table, self._member_of, partials)
        self._finish(self._index, partials, self._starts, self._scales)


def _write_table(matrices: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The table, the number of the matrix of each program, and where the programs of each matrix start and end."""
    device = matrices[0].device
    table = torch.empty(len(matrices), ENTRY, dtype=torch.int64, device=device)
    words, starts = [], [0]
    for number, matrix in enumerate(matrices):
        rows, columns, stride = amax.extent(matrix)
        place = (matrix.data_ptr() - table[number].data_ptr()) // ALIGNMENT
        programs = amax.programs_for(matrix)
        words.append([place, rows, columns, stride, amax.blocks_of(rows, columns), starts[-1], programs, 0])
        starts.append(starts[-1] + programs)
    # The CPU is named because torch.set_default_device would put them elsewhere.
    table.copy_(torch.tensor(words, dtype=torch.int64, device="cpu"))
    ends = torch.tensor(starts, dtype=torch.int32, device="cpu")
    member_of = torch.repeat_interleave(torch.arange(len(matrices), dtype=torch.int32, device="cpu"), ends.diff())
    return table, member_of.to(device), ends.to(device)


@lru_cache(4096)
def _prepare(programs: int, dtype: torch.dtype) -> Launcher:
    constants = amax.TYPES[dtype], amax.ROWS, amax.COLUMNS, ENTRY
    return Launcher(amax_many, (programs, 1, 1), (), constants, num_warps=amax.WARPS)


@lru_cache(4096)
def _prepare_scales(count: int) -> Launcher:
    return Launcher(amax.scale_of, (count, 1, 1), (0,), (amax.MOST_PROGRAMS,), num_warps=1)
