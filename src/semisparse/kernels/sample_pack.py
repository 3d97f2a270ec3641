"""One pass over a gradient dy (M x N): draw S(dy), two of each four tokens, and write it packed.

It is packed as the operand A = S(dy^T) (N x M) of the weight gradient. The sums of dy's columns, for the bias, are made
on the way.

Blocks, tile pairs and stores are those of prune_pack.py's transpose. Bit for bit as reference/mvue.py.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from semisparse.errors import ShapeError, TensorError
from semisparse.formats.layout import ALIGNMENT, PACKED_DTYPES, SPARSE_MULTIPLE, MetadataLayout
from semisparse.kernels import mvue, packed_values
from semisparse.kernels.grid import INT32_END, block_at, grid_of
from semisparse.kernels.launch_checks import check_buffer
from semisparse.kernels.launcher import Launcher
from semisparse.kernels.packed_metadata import repeated, store_metadata
from semisparse.kernels.prune_pack import Block, check_block

BLOCK = Block(tile_rows=16, pairs=8, warps=2, registers=None)
"""The fastest of 44 on one H100, at each of five shapes, with sums and without (2026-11-26; no result file is kept)."""

_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit
def _draw(words, tile_row, tile_column, key, TYPE: tl.constexpr, NATIVE: tl.constexpr):
    """The kept words of a tile's four columns, and their four nibbles as one number."""
    numbers = mvue.uniforms(words, tile_row, tile_column, key, NATIVE)
    kept, nibbles = (), 0
    for j in tl.static_range(4):
        halves = 0x7632 if j % 2 else 0x5410
        low = packed_values.permute_bytes(words[j // 2], words[2 + j // 2], halves, NATIVE)
        high = packed_values.permute_bytes(words[4 + j // 2], words[6 + j // 2], halves, NATIVE)
        word, nibble = mvue.sample_group(low, high, numbers[j], TYPE, NATIVE)
        kept = kept + (word,)
        nibbles = nibbles | (nibble << (4 * j))
    return kept, nibbles


@triton.jit
def _column_sums(words, half: tl.constexpr, TYPE: tl.constexpr):
    """The sums (fp32) of a tile's columns 2 * half and 2 * half + 1."""
    even, odd = packed_values.word_values(words[half], TYPE)
    for i in tl.static_range(1, 4):
        more = packed_values.word_values(words[2 * i + half], TYPE)
        even += more[0]
        odd += more[1]
    return even, odd


@triton.jit
def _store_sums(sums, of_tiles, columns, TILE_ROWS: tl.constexpr, PAIRS: tl.constexpr):
    """Add up the sums of a block's tiles by column, and store them."""
    pair = tl.arange(0, 4)[:, None, None] + 4 * tl.arange(0, PAIRS // 4)[None, :, None]
    for j in tl.static_range(4):
        by_row = tl.reshape(of_tiles[j], (4, 8, TILE_ROWS // 8, PAIRS // 4, 2))
        total = tl.sum(tl.sum(by_row, axis=2), axis=1)
        column = 8 * pair + 4 * tl.arange(0, 2)[None, None, :] + j
        tl.store(sums + column, total, mask=column < columns)


@triton.jit(do_not_specialize=("rows", "row_blocks", "blocks"))
def sample_pack(
    gradient, seed, packed, sums, rows, rows_padded, columns, stride, row_blocks, blocks,
    TYPE: tl.constexpr, BITS: tl.constexpr, PADDING: tl.constexpr, TILE_ROWS: tl.constexpr, PAIRS: tl.constexpr,
    EVEN: tl.constexpr, WIDE: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """The kernel; see launch for the arguments, and prune_pack for the way a program goes through a block.

    stride: int64 words from row to row. seed and sums may be None.
    """
    down, right = block_at(columns, 8 * PAIRS, WIDE)
    row_words, row_words_t = columns // 4, rows_padded // 4
    if WIDE:
        stride, blocks, row_words_t = tl.cast(stride, tl.int64), tl.cast(blocks, tl.int64), row_words_t.to(tl.int64)
    REST: tl.constexpr = TILE_ROWS * PAIRS // 32
    rest = tl.arange(0, REST)[None, None, :, None]
    local_row = tl.arange(0, 8)[None, :, None, None] + 8 * (rest // (PAIRS // 4))
    local_pair = tl.arange(0, 4)[:, None, None, None] + 4 * (rest % (PAIRS // 4))
    local_column = 2 * local_pair + tl.arange(0, 2)[None, None, None, :]
    tile_column = right * 2 * PAIRS + local_column
    key = tl.zeros((1, 1, 1, 1), tl.int64)
    if seed is not None:
        key += tl.load(seed)
    first = down * TILE_ROWS  # row of tiles
    tile_row = first + local_row
    inside = (tile_row < row_words_t) & (tile_column < row_words)
    if EVEN:
        inside = tl.full((4, 8, REST, 2), 1, tl.int1)
    start = gradient + (4 * first).to(tl.int64) * stride + right * (2 * PAIRS)
    words = ()
    for i in tl.static_range(4):
        present = inside
        if not EVEN:
            present = inside & (4 * tile_row + i < rows)
        at = start + (4 * local_row + i) * stride + local_column
        words = words + packed_values.load_line(at, present, TYPE, TYPE, NATIVE, False)[2]
    if sums is not None:
        to = sums + down.to(tl.int64) * columns + right * (8 * PAIRS)
        of_tiles = _column_sums(words, 0, TYPE) + _column_sums(words, 1, TYPE)
        _store_sums(to, of_tiles, columns - right * (8 * PAIRS), TILE_ROWS, PAIRS)
    kept, nibbles = _draw(words, tile_row, tile_column, key, TYPE, NATIVE)
    out = packed.to(tl.pointer_type(tl.int32)) + (right * 8 * PAIRS).to(tl.int64) * row_words_t + first
    packed_values.store_columns(out, kept, inside, local_pair, local_row, row_words_t, REST)
    if not EVEN:
        nibbles = tl.where(inside, nibbles, PADDING & 0xFFFF)
    even, odd = tl.split(nibbles)
    store_metadata(
        packed, rows_padded.to(tl.int64) * columns, even | (odd << 16), right * 8 * PAIRS, first,
        row_blocks, blocks, BITS, True, TILE_ROWS, PAIRS,
    )  # fmt: skip


def launch(
    grad_output: Tensor,
    seed: Tensor | None,
    packed: Tensor,
    sums: Tensor | None,
    *,
    layout: MetadataLayout,
    rows_padded: int,
    block: Block = BLOCK,
) -> Launcher:
    """Write the packed sample of a gradient's transpose. Asynchronous, on the device's current stream.

    Args:
        grad_output: dy, M x N, fp16 or bf16, N a multiple of 16. Rows are read in 16-byte pieces; a matrix whose rows
            are not contiguous and aligned for that is copied first.
        seed: Key of the random numbers, one int64 element on the device; None for the key 0.
        packed: Contiguous uint8, long enough for N x rows_padded values at 2:4 and whole metadata blocks.
        sums: fp32, sum_rows(M') x N, for the sums of dy over the rows of each program; None to leave them out.
        layout: Where the metadata goes.
        rows_padded: M', M rounded up to a multiple of 16: rows of zeros follow.
        block: What one program covers.

    Returns:
        What was launched. Its pointers are grad_output, seed, packed and sums.

    Raises:
        ShapeError: A size or a buffer does not fit.
        TensorError: A dtype does not fit.
        ConfigError: block does not hold whole metadata blocks.
    """
    rows, columns = grad_output.shape
    if grad_output.stride(1) != 1 or grad_output.stride(0) * 2 % ALIGNMENT or grad_output.data_ptr() % ALIGNMENT:
        grad_output = grad_output.clone(memory_format=torch.contiguous_format)
    if seed is not None and (seed.dtype != torch.int64 or seed.numel() != 1):
        raise TensorError(f"seed is {seed.dtype} {tuple(seed.shape)}; it must be one int64 element")
    index = grad_output.get_device()
    sizes = rows, rows_padded, columns, grad_output.stride(0) // 4
    given = seed is not None, sums is not None
    start = _prepare(sizes, grad_output.dtype, layout, block, given, native=index >= 0)
    check_buffer("packed", packed, columns, rows_padded, layout)
    if sums is not None and (
        sums.shape != (wanted := (sum_rows(rows_padded, block), columns)) or not sums.is_contiguous()
    ):
        raise ShapeError(f"sums has shape {tuple(sums.shape)}; it must be contiguous and {wanted}")
    start(index, grad_output.view(torch.int64), seed, packed, sums)
    return start


def sum_rows(rows_padded: int, block: Block = BLOCK) -> int:
    """Rows of sums for a gradient: one for each row of programs."""
    return -(-rows_padded // (4 * block.tile_rows))


@lru_cache(4096)
def _prepare(
    sizes: tuple[int, int, int, int],
    dtype: torch.dtype,
    layout: MetadataLayout,
    block: Block,
    given: tuple[bool, bool],
    native: bool,
) -> Launcher:
    """All of a launch that does not change while shapes repeat.

    Args:
        sizes: Rows, rows with padding, columns, stride.
        dtype: Of the gradient.
        layout: As launch's.
        block: As launch's.
        given: Whether seed and sums are. Only a key: the kernel is compiled for it.
        native: Whether the kernel runs on a GPU.
    """
    rows, rows_padded, columns, stride = sizes
    if dtype not in PACKED_DTYPES:
        raise TensorError(f"grad_output is {dtype}; use fp16 or bf16")
    if columns % SPARSE_MULTIPLE or rows_padded % SPARSE_MULTIPLE or rows_padded < rows:
        raise ShapeError(
            f"grad_output is {rows} x {columns}, padded to {rows_padded} rows; both must be multiples of "
            f"{SPARSE_MULTIPLE}"
        )
    check_block(block, layout, transpose_only=True)
    height, width = 4 * block.tile_rows, 8 * block.pairs
    even = rows == rows_padded and not (columns % width or rows % height)
    grid, wide = grid_of(rows_padded, columns, height, width, flat=height * stride >= INT32_END)
    return Launcher(
        sample_pack,
        grid,
        (*sizes, *layout.blocks(columns, rows_padded)),
        (_TYPES[dtype], layout.bits, repeated(layout.padding), block.tile_rows, block.pairs, even, wide, native),
        num_warps=block.warps,
        maxnreg=None if wide else block.registers,
    )
