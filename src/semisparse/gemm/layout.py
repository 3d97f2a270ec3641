"""Where the engine stores each 2-bit pair of the metadata: described, found by probing, verified, and spoken.

A packed matrix (R x C) is one uint8 buffer: the kept values, R x C/2 row by row, then 4 bits for each group of four
(pattern.metadata_nibble). The place of a nibble is undocumented and differs between GPU generations. On sm90 it was
measured to be a bit permutation: within blocks of a power of two of rows and groups, each bit of a nibble's address
is one bit of the row or of the group; blocks lie row by row, and both axes are padded to whole blocks. The compressor
asks for a little more than that at some sizes (packed_bytes) and leaves those last bytes unwritten; nobody reads them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from semisparse.gemm.problem import pad
from semisparse.pattern import GROUP, KEPT
from semisparse.reference.packing import Packed
from semisparse.reference.packing import pack as reference_pack

GROUP_BIT = 32
"""Added to the number of a group bit in MetadataLayout.bits, to tell it from a row bit."""

PROBE_ROWS, PROBE_GROUPS = 256, 64

ZERO_NIBBLE = 0b1110
"""What NVIDIA's compressor stores for a group of four zeros, and for padding (measured on one H200)."""


@dataclass(frozen=True, slots=True)
class MetadataLayout:
    """A bit permutation of (row, group) within blocks.

    bits: for each bit of a nibble's address within its block, lowest first, its source: r for bit r of the row,
    GROUP_BIT + g for bit g of the group. padding: the nibble of the groups that fill up the last blocks.
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

    def padded(self, rows: int, columns: int) -> tuple[int, int]:
        """Rows and groups of a rows x columns matrix's metadata, padding included."""
        return pad(rows, self.block_rows), pad(columns // GROUP, self.block_groups)

    def metadata_bytes(self, rows: int, columns: int) -> int:
        """Bytes of metadata of a rows x columns matrix."""
        padded_rows, groups = self.padded(rows, columns)
        return padded_rows * groups // 2

    def nibble_address(self, rows: Tensor, groups: Tensor, columns: int) -> Tensor:
        """Address, in nibbles from the start of the metadata, of the nibbles of rows and groups (int64, broadcast)."""
        blocks = self.padded(0, columns)[1] // self.block_groups
        address = (rows // self.block_rows * blocks + groups // self.block_groups) << len(self.bits)
        for place, bit in enumerate(self.bits):
            source = rows >> bit if bit < GROUP_BIT else groups >> (bit - GROUP_BIT)
            address = address | (source & 1) << place
        return address

    def encode(self, packed: Packed) -> Tensor:
        """Values and metadata (uint8) of a packed matrix, whole blocks and nothing behind them."""
        rows, groups = packed.nibbles.shape
        nibbles = packed.nibbles.new_full((2 * self.metadata_bytes(rows, groups * GROUP),), self.padding)
        nibbles[_addresses(self, rows, groups * GROUP, packed.nibbles.device)] = packed.nibbles
        metadata = nibbles[0::2] | nibbles[1::2] << 4
        return torch.cat([packed.values.contiguous().view(torch.uint8).flatten(), metadata])

    def decode(self, buffer: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Packed:
        """Values and nibbles of an engine's buffer of a rows x columns matrix; the inverse of encode."""
        size = rows * columns // GROUP * KEPT * dtype.itemsize
        values = buffer[:size].clone().view(dtype).view(rows, columns // GROUP * KEPT)
        metadata = buffer[size : size + self.metadata_bytes(rows, columns)]
        nibbles = torch.stack([metadata & 15, metadata >> 4], dim=1).flatten()
        return Packed(values, nibbles[_addresses(self, rows, columns, buffer.device)])


@dataclass(frozen=True, slots=True)
class NotAPermutation:
    """The engine's format is not one that the pack kernel can write; reason says in what it differs."""

    reason: str


SM90_16BIT = MetadataLayout((3, 34, 32, 33, 0, 1, 2, 4, 5))
"""fp16 and bf16 on sm90: blocks of 64 rows x 32 columns (measured on one H200, cuSPARSELt 0.8.0)."""

SM90_8BIT = MetadataLayout((32, 3, 35, 33, 34, 0, 1, 2, 4, 5))
"""8-bit types on sm90: blocks of 64 rows x 64 columns (measured as above)."""


def packed_bytes(rows: int, columns: int) -> int:
    """Bytes of the buffer of a packed rows x columns matrix of 16-bit values; SymInts are fine.

    As the compressor asks for them (measured on one H200 at 16 sizes): room for whole metadata blocks, whichever way
    the blocks are turned.
    """
    upright, turned = pad(rows, 64) * pad(columns, 32), pad(rows, 32) * pad(columns, 64)
    return rows * columns + torch.sym_max(upright, turned) // 8


def discover(
    compress: Callable[[Tensor], Tensor], dtype: torch.dtype, *, device: torch.device
) -> MetadataLayout | NotAPermutation:
    """Find the layout that compress (2:4 matrix -> engine's buffer) writes, and verify it on matrices with padding.

    Compresses one matrix for each bit of a group's index, whose groups keep (0, 1) or (2, 3) by that bit: read back
    together, the nibble at each address then spells the group it belongs to.
    """
    sources = _spelled(compress, dtype, device)
    if isinstance(sources, NotAPermutation):
        return sources
    row_bits, group_bits = PROBE_ROWS.bit_length() - 1, PROBE_GROUPS.bit_length() - 1
    bits = []
    for place in range(row_bits + group_bits):
        source = sources[1 << place]
        if source.bit_count() != 1:
            return NotAPermutation(f"address bit {place} depends on {source.bit_count()} bits of row and group")
        index = source.bit_length() - 1
        bits.append(index + GROUP_BIT if index < group_bits else index - group_bits)
    linear = [0]
    for place in range(row_bits + group_bits):
        linear += [known ^ sources[1 << place] for known in linear]
    if linear != sources:
        return NotAPermutation("the address is no linear function of row and group")
    refusal: NotAPermutation | None = None
    for block in _blocks(bits, group_bits, row_bits):
        found = _verified(compress, dtype, device, block)
        if isinstance(found, MetadataLayout):
            return found
        refusal = refusal or found
    return refusal or NotAPermutation(f"blocks do not lie row by row: address bits {bits}")


def _spelled(
    compress: Callable[[Tensor], Tensor], dtype: torch.dtype, device: torch.device
) -> list[int] | NotAPermutation:
    """For each address of a probe matrix's metadata, the index (row * PROBE_GROUPS + group) of its group."""
    count = PROBE_ROWS * PROBE_GROUPS
    index = torch.arange(count, device=device)
    spelled = torch.zeros(count, dtype=torch.int64, device=device)
    for bit in range(count.bit_length() - 1):
        upper = (index >> bit & 1).bool()[:, None]
        group = torch.tensor([0, 0, 1, 1], dtype=dtype, device=device)
        matrix = torch.where(upper, group, group.flip(0)).view(PROBE_ROWS, PROBE_GROUPS * GROUP)
        metadata = compress(matrix)[count * KEPT * dtype.itemsize :]
        # This size is whole blocks either way, so there is nothing behind the metadata.
        if metadata.numel() != count // 2:
            return NotAPermutation(f"{count} groups have {metadata.numel()} bytes of metadata, not {count // 2}")
        nibbles = torch.stack([metadata & 15, metadata >> 4], dim=1).flatten()
        if not bool(((nibbles == 0b0100) | (nibbles == 0b1110)).all()):
            return NotAPermutation("the metadata is not 4 bits a group: first kept index | second kept index << 2")
        spelled += (nibbles == 0b1110).long() << bit
    found: list[int] = spelled.tolist()
    return found if sorted(found) == list(range(count)) else NotAPermutation("two addresses hold one group")


def _blocks(bits: list[int], group_bits: int, row_bits: int) -> Iterator[tuple[int, ...]]:
    """Possible blocks, the shortest first: beyond one come the other group bits in order, then the other row bits.

    They agree on matrices of whole blocks and differ in how others are padded.
    """
    for size in range(3, len(bits) + 1):
        inside = set(bits[:size])
        groups = sum(bit >= GROUP_BIT for bit in inside)
        rest = [GROUP_BIT + g for g in range(groups, group_bits)] + list(range(size - groups, row_bits))
        if bits[size:] == rest:
            yield tuple(bits[:size])


def _verified(
    compress: Callable[[Tensor], Tensor], dtype: torch.dtype, device: torch.device, bits: tuple[int, ...]
) -> MetadataLayout | NotAPermutation:
    """The layout, once its bytes equal the compressor's, padding included, on random matrices of uneven sizes."""
    layout = MetadataLayout(bits)
    generator = torch.Generator().manual_seed(0)
    for rows, columns in ((192, 160), (48, 80), (16, 16), (80, 336)):
        scores = torch.rand(rows, columns // GROUP, GROUP, generator=generator)
        mask = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.topk(KEPT, -1).indices, True)
        mask = mask.view(rows, columns).to(device)
        values = torch.randint(1, 128, (rows, columns), generator=generator).to(device, dtype)
        expected = compress(torch.where(mask, values, 0))
        written = layout.encode(reference_pack(values, mask, dtype))
        if expected.numel() < written.numel():
            return NotAPermutation(f"{rows} x {columns} takes {expected.numel()} bytes, not {written.numel()}")
        if not torch.equal(expected[: written.numel()], written):
            return NotAPermutation(f"the layout found by probing does not hold at {rows} x {columns}")
    return layout


@lru_cache(maxsize=8)
def _addresses(layout: MetadataLayout, rows: int, columns: int, device: torch.device) -> Tensor:
    row = torch.arange(rows, device=device)[:, None]
    group = torch.arange(columns // GROUP, device=device)[None, :]
    return layout.nibble_address(row, group, columns)
