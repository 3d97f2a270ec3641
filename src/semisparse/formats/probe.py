"""Discovery of the metadata layout that a compressor writes: found by probing, then verified byte for byte."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from semisparse.formats.layout import GROUP_BIT, MetadataLayout
from semisparse.pattern import GROUP, KEPT
from semisparse.reference.packing import pack as reference_pack

PROBE_ROWS, PROBE_GROUPS = 256, 64

# By bytes of a value, sizes that the compressor takes: whole blocks or not, one row of blocks or more.
_VERIFIED_SIZES = {
    1: ((192, 160), (160, 96), (32, 32), (96, 352)),
    2: ((192, 160), (48, 80), (16, 16), (80, 336)),
}

Compress = Callable[[Tensor], Tensor]
"""A 2:4 matrix (contiguous, of the dtype that discover was given) -> its packed buffer (uint8)."""


class NotAPermutation(NamedTuple):
    """The compressor's format is not one that the pack kernel can write; reason says how it differs."""

    reason: str


def discover(compress: Compress, dtype: torch.dtype, *, device: torch.device) -> MetadataLayout | NotAPermutation:
    """Find the layout that compress writes, and verify it on matrices with padding.

    Compresses one matrix per bit of a group's index, whose groups keep (0, 1) or (2, 3) by that bit. Read back
    together, the nibbles at each address give the index of the group stored there.

    Args:
        compress: The compressor.
        dtype: Of the matrices it is given: fp16 or bf16, or uint8 for the bytes of 8-bit values.
        device: Of these matrices.

    Returns:
        The verified layout, or the reason why no layout describes the format.
    """
    sources = _stored_groups(compress, dtype, device)
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
        return NotAPermutation("the address is not a linear function of row and group")
    refusal: NotAPermutation | None = None
    for block in _blocks(bits, group_bits, row_bits):
        found = _verified(compress, dtype, device, block)
        if isinstance(found, MetadataLayout):
            return found
        refusal = refusal or found
    return refusal or NotAPermutation(f"blocks are not stored row by row: address bits {bits}")


def _stored_groups(compress: Compress, dtype: torch.dtype, device: torch.device) -> list[int] | NotAPermutation:
    """For each address of a probe matrix's metadata, the index (row * PROBE_GROUPS + group) of its group."""
    count = PROBE_ROWS * PROBE_GROUPS
    index = torch.arange(count, device=device)
    stored = torch.zeros(count, dtype=torch.int64, device=device)
    for bit in range(count.bit_length() - 1):
        upper = (index >> bit & 1).bool()[:, None]
        group = torch.tensor([0, 0, 1, 1], dtype=dtype, device=device)
        matrix = torch.where(upper, group, group.flip(0)).view(PROBE_ROWS, PROBE_GROUPS * GROUP)
        metadata = compress(matrix)[count * KEPT * dtype.itemsize :]
        # This size is whole blocks either way, so nothing follows the metadata.
        if metadata.numel() != count // 2:
            return NotAPermutation(f"{count} groups have {metadata.numel()} bytes of metadata, not {count // 2}")
        nibbles = torch.stack([metadata & 15, metadata >> 4], dim=1).flatten()
        if not bool(((nibbles == 0b0100) | (nibbles == 0b1110)).all()):
            return NotAPermutation("the metadata is not 4 bits per group: first kept index | second kept index << 2")
        stored += (nibbles == 0b1110).long() << bit
    found: list[int] = stored.tolist()
    return found if sorted(found) == list(range(count)) else NotAPermutation("two addresses hold one group")


def _blocks(bits: list[int], group_bits: int, row_bits: int) -> Iterator[tuple[int, ...]]:
    """Possible blocks, the shortest first: behind a block come the other group bits in order, then the other row bits.

    They agree on matrices of whole blocks and differ in how others are padded.
    """
    for size in range(3, len(bits) + 1):
        inside = set(bits[:size])
        groups = sum(bit >= GROUP_BIT for bit in inside)
        rest = [GROUP_BIT + g for g in range(groups, group_bits)] + list(range(size - groups, row_bits))
        if bits[size:] == rest:
            yield tuple(bits[:size])


def _verified(
    compress: Compress, dtype: torch.dtype, device: torch.device, bits: tuple[int, ...]
) -> MetadataLayout | NotAPermutation:
    """The layout, once its bytes equal the compressor's, padding included, on random matrices of uneven sizes."""
    layout = MetadataLayout(bits)
    generator = torch.Generator().manual_seed(0)
    for rows, columns in _VERIFIED_SIZES[dtype.itemsize]:
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
