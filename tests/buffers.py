"""Comparing packed buffers."""

from torch import Tensor

from semisparse.formats.layout import MetadataLayout
from semisparse.testing import assert_bit_equal


def assert_same_buffer(
    ours: Tensor, expected: Tensor, layout: MetadataLayout, rows: int, columns: int, itemsize: int = 2
) -> None:
    """All that packing writes: what lies behind the last block of metadata is left as it was."""
    assert ours.shape == expected.shape
    written = layout.buffer_bytes(rows, columns, itemsize)
    assert_bit_equal(ours[:written], expected[:written])
