"""Buffers of packed weights: full of padding, and kept for weights of one shape."""

import pytest
import torch

from semisparse.formats.layout import FP8, PADDING, packed_bytes
from semisparse.nn.pack_together import fit, new_buffers

BF16 = torch.bfloat16


@pytest.mark.parametrize("dtype", [BF16, FP8], ids=str)
@pytest.mark.parametrize("both_ways", [True, False])
def test_all_of_a_new_buffer_is_padding_since_the_layout_of_the_device_may_end_anywhere(
    dtype: torch.dtype, both_ways: bool
) -> None:
    made = new_buffers(torch.empty(96, 160), dtype, both_ways)
    sizes = packed_bytes(96, 160, dtype.itemsize), both_ways * packed_bytes(160, 96, dtype.itemsize)
    assert (made.matrix.numel(), made.transposed.numel()) == sizes
    assert bool((made.matrix == PADDING).all() and (made.transposed == PADDING).all())
    assert (made.scale is None) is (dtype is BF16)


def test_buffers_fit_weights_of_their_shape_alone() -> None:
    weight, turned = torch.empty(144, 16), torch.empty(16, 144)  # as many bytes, but metadata that ends elsewhere
    made = new_buffers(weight, BF16, True)
    assert fit(made, weight.clone(), BF16, True)
    assert [buffer.numel() for buffer in new_buffers(turned, BF16, True)[:2]] == [made.matrix.numel()] * 2
    assert not fit(made, turned, BF16, True)
    assert not fit(made, weight, BF16, False) and not fit(made, weight, FP8, True)
    assert not fit(made, weight.to("meta"), BF16, True)
