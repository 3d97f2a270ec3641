"""Finding out where a compressor stores metadata, with simulated compressors on the CPU."""

import pytest
import torch

from semisparse.formats.layout import SM90_8BIT, SM90_16BIT, SPARSE_MULTIPLE_8BIT, MetadataLayout, sm90_layout
from semisparse.formats.probe import NotAPermutation, discover
from semisparse.reference import masks, packing

CPU = torch.device("cpu")


def compressor(layout, change=lambda buffer, matrix: buffer):
    """Packs as an engine with this layout would; change: what it does to the buffer afterwards."""

    def compress(matrix):
        # An engine sees values only. Every group of every probe has two that are not zero, so they say what is kept.
        return change(layout.encode(packing.pack(matrix, matrix != 0)), matrix)

    return compress


@pytest.mark.parametrize("layout", [SM90_16BIT, SM90_8BIT], ids=["16bit", "8bit"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_two_measured_layouts_are_found(layout, dtype):
    assert discover(compressor(layout), dtype, device=CPU) == layout


@pytest.mark.parametrize("layout", [SM90_8BIT, MetadataLayout((32, 0, 33, 1, 34, 35))], ids=["8bit", "other"])
def test_the_layout_of_8_bit_values_is_found_from_bytes_at_sizes_that_they_have(layout):
    def compress(matrix):
        assert matrix.dtype == torch.uint8 and not any(size % SPARSE_MULTIPLE_8BIT for size in matrix.shape)
        return compressor(layout)(matrix)

    assert discover(compress, torch.uint8, device=CPU) == layout


@pytest.mark.parametrize("bits", [(32, 33, 34), (0, 32, 1, 33), (5, 4, 3, 2, 1, 0, 32, 33, 34, 35)], ids=str)
def test_any_bit_permutation_in_blocks_is_found(bits):
    found = discover(compressor(MetadataLayout(bits)), torch.bfloat16, device=CPU)
    assert isinstance(found, MetadataLayout)
    matrix = torch.randn(64, 192).bfloat16()
    packed = packing.pack(matrix, masks.row(matrix))
    assert torch.equal(found.encode(packed), MetadataLayout(bits).encode(packed))


def rotated(buffer, matrix):
    """Nibble addresses run on by one: no permutation of bits."""
    size = matrix.numel()
    nibbles = torch.stack([buffer[size:] & 15, buffer[size:] >> 4], 1).flatten().roll(1)
    return torch.cat([buffer[:size], nibbles[0::2] | nibbles[1::2] << 4])


def mixed(buffer, matrix):
    """One address bit is the exclusive or of two bits: linear, but no permutation."""
    size = matrix.numel()
    nibbles = torch.stack([buffer[size:] & 15, buffer[size:] >> 4], 1).flatten()
    at = torch.arange(len(nibbles))
    nibbles = nibbles[at ^ (at >> 1 & 1)]
    return torch.cat([buffer[:size], nibbles[0::2] | nibbles[1::2] << 4])


def crossed(buffer, matrix):
    """Two nibbles changed places: every address bit alone says one thing, some addresses together another."""
    size = matrix.numel()
    nibbles = torch.stack([buffer[size:] & 15, buffer[size:] >> 4], 1).flatten()
    nibbles[[3, 5]] = nibbles[[5, 3]]
    return torch.cat([buffer[:size], nibbles[0::2] | nibbles[1::2] << 4])


def bitmap(buffer, matrix):
    """Another code: a 4-bit mask of what is kept."""
    size = matrix.numel()
    kept = (matrix != 0).view(-1, 4).to(torch.uint8)
    nibbles = kept[:, 0] | kept[:, 1] << 1 | kept[:, 2] << 2 | kept[:, 3] << 3
    return torch.cat([buffer[:size], nibbles[0::2] | nibbles[1::2] << 4])


def longer(buffer, matrix):
    return torch.cat([buffer, buffer[-64:]])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (rotated, "address"),
        (mixed, "depends on 2 bits"),
        (crossed, "not a linear function"),
        (bitmap, "not 4 bits per group: first kept index"),
        (longer, "bytes of metadata"),
    ],
)
def test_what_is_no_permutation_is_refused_with_the_reason(change, reason):
    found = discover(compressor(SM90_16BIT, change), torch.float16, device=CPU)
    assert isinstance(found, NotAPermutation)
    assert reason in found.reason


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        *((torch.float16, shape) for shape in ((192, 160), (48, 80), (16, 16), (80, 336))),
        *((torch.uint8, shape) for shape in ((192, 160), (160, 96), (32, 32), (96, 352))),
    ],
    ids=str,
)
def test_a_layout_that_does_not_hold_at_every_size_is_refused(dtype, shape):
    """Whole blocks or not, more rows of blocks than one or not."""

    def change(buffer, matrix):
        if matrix.shape != shape:
            return buffer
        flipped = buffer.clone()
        flipped[matrix.nbytes // 2] ^= 1
        return flipped

    found = discover(compressor(sm90_layout(dtype), change), dtype, device=CPU)
    assert isinstance(found, NotAPermutation)
    assert "does not hold" in found.reason
