"""Layout of the 2:4 metadata in cuSPARSELt's packed buffer: its description, and encode/decode in plain PyTorch.

A packed matrix (R x C) is one uint8 buffer: the kept values, R x C/2 row by row, then 4 bits per group of four
(pattern.metadata_nibble). The place of a nibble is undocumented and differs between GPU generations. On sm90 it was
measured to be a bit permutation: within blocks of a power of two of rows and groups, each bit of a nibble's address is
one bit of the row or of the group. Blocks are stored row by row, and both axes are padded to whole blocks. At some
sizes the compressor asks for a little more than that (compressed_bytes); it leaves those last bytes unwritten. Products
read beyond them at some sizes (packed_bytes). What they read there meets zeros, but a tensor core's behaviour is
undefined for nibbles that do not name two entries in order, so buffers end in padding (PADDING).

This module holds the facts of the format that kernels and engine share. Each is written down here only.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from semisparse.pattern import GROUP, KEPT, Packed

SPARSE_MULTIPLE = 16
"""Rows and columns of a packed matrix must be multiples of this (16-bit types; measured on cuSPARSELt 0.8.0)."""

SPARSE_MULTIPLE_8BIT = 32
"""The same for 8-bit types."""

ALIGNMENT = 16
"""Bytes. cuSPARSELt needs every device address to be a multiple of this, and the kernels load rows in such pieces."""

PACKED_DTYPES = (torch.float16, torch.bfloat16)
"""Dtypes of packed 16-bit values."""

FP8 = torch.float8_e4m3fn
"""Dtype of packed 8-bit values. They come with a scale (reference/fp8.py), so most code takes 16-bit dtypes only."""

GROUP_BIT = 32
"""Added to the number of a group bit in MetadataLayout.bits, to tell it from a row bit."""

ZERO_NIBBLE = 0b1110
"""What NVIDIA's compressor stores for a group of four zeros, and for padding (measured on one H200)."""

PADDING = ZERO_NIBBLE | ZERO_NIBBLE << 4
"""The byte of which all that follows the last metadata block consists."""

READ_TOGETHER = 4
"""Metadata blocks of one row of blocks that a product may read at once: so many cover a tile of 128 columns of 16-bit
values and of 256 of 8-bit ones. memcheck on one H100 (cuSPARSELt 0.8.0) saw a product of a 32 x 32 matrix of bf16,
which has one block, read two."""

LARGEST_BLOCK = (64, 16)
"""Rows and groups of the largest metadata block that the pack kernel writes: what its smallest program covers."""


class MetadataLayout(NamedTuple):
    """A bit permutation of (row, group) within blocks.

    Attributes:
        bits: The source of each bit of a nibble's address within its block, lowest first: r for bit r of the row,
            GROUP_BIT + g for bit g of the group.
        padding: The nibble of the groups that fill up the last blocks.
    """

    bits: tuple[int, ...]
    padding: int = ZERO_NIBBLE

    @property
    def block_rows(self) -> int:
        """Rows in a block."""
        return 1 << sum(bit < GROUP_BIT for bit in self.bits)

    @property
    def block_groups(self) -> int:
        """Groups of four columns in a block."""
        return 1 << sum(bit >= GROUP_BIT for bit in self.bits)

    def blocks(self, rows: int, columns: int) -> tuple[int, int]:
        """Rows of blocks and blocks per row of the metadata of a rows x columns matrix."""
        return -(-rows // self.block_rows), -(-(columns // GROUP) // self.block_groups)

    def metadata_bytes(self, rows: int, columns: int) -> int:
        """Bytes of metadata of a rows x columns matrix, padding included."""
        down, across = self.blocks(rows, columns)
        return (down * across << len(self.bits)) // 2

    def buffer_bytes(self, rows: int, columns: int, itemsize: int = 2) -> int:
        """Bytes of a packed rows x columns matrix: values of itemsize bytes, then whole metadata blocks."""
        return rows * columns * itemsize // (GROUP // KEPT) + self.metadata_bytes(rows, columns)

    def pad_behind(self, buffer: Tensor, rows: int, columns: int, itemsize: int = 2) -> int:
        """Write PADDING to what follows the last metadata block in the buffer of a matrix, and return those bytes.

        Args:
            buffer: uint8, at least buffer_bytes long, or empty: no matrix.
            rows: Rows of the matrix.
            columns: Columns of the matrix.
            itemsize: Bytes of a value, 1 or 2.
        """
        behind = _bytes_behind(self, buffer.numel(), rows, columns, itemsize)
        if behind:
            buffer[-behind:].fill_(PADDING)
        return behind

    def nibble_address(self, rows: Tensor, groups: Tensor, columns: int) -> Tensor:
        """Addresses of nibbles.

        Args:
            rows: int64, broadcast with groups.
            groups: Groups of four columns, int64.
            columns: Columns of the matrix.

        Returns:
            int64, in nibbles from the start of the metadata.
        """
        across = self.blocks(0, columns)[1]
        address = (rows // self.block_rows * across + groups // self.block_groups) << len(self.bits)
        for place, bit in enumerate(self.bits):
            source = rows >> bit if bit < GROUP_BIT else groups >> (bit - GROUP_BIT)
            address = address | (source & 1) << place
        return address

    def encode(self, packed: Packed) -> Tensor:
        """Values and metadata of a packed matrix as one uint8 buffer that ends with the last whole block."""
        rows, groups = packed.nibbles.shape
        nibbles = packed.nibbles.new_full((2 * self.metadata_bytes(rows, groups * GROUP),), self.padding)
        nibbles[_addresses(self, rows, groups * GROUP, packed.nibbles.device)] = packed.nibbles
        metadata = nibbles[0::2] | nibbles[1::2] << 4
        return torch.cat([packed.values.contiguous().view(torch.uint8).flatten(), metadata])

    def decode(self, buffer: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Packed:
        """Values and nibbles of a packed rows x columns matrix; the inverse of encode.

        Args:
            buffer: uint8; bytes behind the last metadata block are not read.
            rows: Rows of the matrix.
            columns: Columns of the matrix.
            dtype: Of the values.
        """
        size = rows * columns // GROUP * KEPT * dtype.itemsize
        values = buffer[:size].clone().view(dtype).view(rows, columns // GROUP * KEPT)
        metadata = buffer[size : size + self.metadata_bytes(rows, columns)]
        nibbles = torch.stack([metadata & 15, metadata >> 4], dim=1).flatten()
        return Packed(values, nibbles[_addresses(self, rows, columns, buffer.device)])


SM90_16BIT = MetadataLayout((3, 34, 32, 33, 0, 1, 2, 4, 5))
"""fp16 and bf16 on sm90: blocks of 64 rows x 32 columns (measured on one H200, cuSPARSELt 0.8.0)."""

SM90_8BIT = MetadataLayout((32, 3, 35, 33, 34, 0, 1, 2, 4, 5))
"""8-bit types on sm90: blocks of 64 rows x 64 columns (measured as above)."""


# Rows and columns of a block, by bytes of a value.
_BLOCKS = {size: (made.block_rows, made.block_groups * GROUP) for size, made in ((1, SM90_8BIT), (2, SM90_16BIT))}


def sparse_multiple(dtype: torch.dtype) -> int:
    """What rows and columns of a packed matrix of a dtype must be multiples of."""
    return SPARSE_MULTIPLE_8BIT if dtype.itemsize == 1 else SPARSE_MULTIPLE


def sm90_layout(dtype: torch.dtype) -> MetadataLayout:
    """The layout on sm90, which is also written where there is no engine, and on the CPU."""
    return SM90_8BIT if dtype.itemsize == 1 else SM90_16BIT


def packed_bytes(rows: int, columns: int, itemsize: int = 2) -> int:
    """Bytes of the buffer of a packed rows x columns matrix; SymInts are accepted.

    What the compressor asks for (compressed_bytes), and behind it room for the blocks of metadata that are missing to a
    multiple of READ_TOGETHER in the last row of blocks: products read them, beyond what the compressor asks for.

    Args:
        rows: Of the matrix.
        columns: Of the matrix.
        itemsize: Bytes of a value, 1 or 2.
    """
    height, width = _BLOCKS[itemsize]
    behind = round_up(columns, READ_TOGETHER * width) - round_up(columns, width)
    return compressed_bytes(rows, columns, itemsize) + behind * height // (2 * GROUP)


def lengthened(buffer: Tensor, rows: int, columns: int, itemsize: int = 2) -> Tensor:
    """The buffer of a packed rows x columns matrix with PADDING behind it, up to packed_bytes."""
    behind = packed_bytes(rows, columns, itemsize) - buffer.numel()
    return torch.nn.functional.pad(buffer, (0, behind), value=PADDING)


def compressed_bytes(rows: int, columns: int, itemsize: int = 2) -> int:
    """Bytes that the compressor asks for, for a rows x columns matrix; SymInts are accepted.

    Room for whole metadata blocks, whichever way the blocks are turned (measured on one H200 at 16 sizes for 16-bit
    types and at 12 for 8-bit types, whose blocks are square).

    Args:
        rows: Of the matrix.
        columns: Of the matrix.
        itemsize: Bytes of a value, 1 or 2.
    """
    height, width = _BLOCKS[itemsize]
    larger = round_up(rows, height) * round_up(columns, width)
    if height != width:
        turned = round_up(rows, width) * round_up(columns, height)
        known = type(larger) is int and type(turned) is int
        larger = max(larger, turned) if known else torch.sym_max(larger, turned)
    return rows * columns * itemsize // (GROUP // KEPT) + larger // (2 * GROUP)


def round_up(size: int, multiple: int) -> int:
    """size rounded up to a multiple; SymInts are accepted."""
    return -(-size // multiple) * multiple


@lru_cache(4096)
def _bytes_behind(layout: MetadataLayout, size: int, rows: int, columns: int, itemsize: int) -> int:
    return max(0, size - layout.buffer_bytes(rows, columns, itemsize))


@lru_cache(maxsize=8)
def _addresses(layout: MetadataLayout, rows: int, columns: int, device: torch.device) -> Tensor:
    row = torch.arange(rows, device=device)[:, None]
    group = torch.arange(columns // GROUP, device=device)[None, :]
    return layout.nibble_address(row, group, columns)
