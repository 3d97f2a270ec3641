"""Ways of pack_fp8 on CUDA that test_fp8_packed.py leaves, on the CPU: kernels run in Triton's interpreter."""

from types import SimpleNamespace

import pytest
import torch

from semisparse import masks, ops
from semisparse.formats.layout import FP8, SM90_8BIT
from semisparse.formats.packed import PackedFormat
from semisparse.kernels import prune_pack8
from semisparse.ops import fp8_packed
from semisparse.ops import packing as ops_packing
from semisparse.ops.packing import _cuda_unpack
from semisparse.testing import assert_bit_equal

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels of CPU tensors need the interpreter")


@pytest.fixture
def launched(monkeypatch):
    """Masks of the launches of the pack kernel, which packs all it can."""
    seen = []
    launch = prune_pack8.launch

    def watched(*args, mask, **kwargs):
        seen.append(mask)
        return launch(*args, mask=mask, **kwargs)

    monkeypatch.setattr(prune_pack8, "launch", watched)
    simulated = PackedFormat("kernel", SM90_8BIT, "simulated")
    engine = SimpleNamespace(available=lambda index: SimpleNamespace(ok=False))
    for module in (fp8_packed, ops_packing):
        monkeypatch.setattr(module, "packed_format", lambda *_: simulated)
        monkeypatch.setattr(module, "engine", lambda: engine)
    return seen


def test_what_is_not_finite_is_packed_as_on_the_cpu(launched):
    weight = torch.randn(32, 64)
    weight[3, 5] = torch.nan
    ours, expected = fp8_packed._cuda_pack_fp8(weight, "transposable", None), ops.pack_fp8(weight, "transposable", None)
    for found, wanted in zip(ours[:2], expected[:2], strict=True):
        assert_bit_equal(found, wanted)
    assert ours[2].isnan() and expected[2].isnan()
    assert launched == ["transposable"]


@pytest.mark.parametrize("mask", [name for name, mask in masks.MASKS.items() if not mask.chosen_while_packing])
def test_a_mask_that_the_kernel_does_not_choose_is_packed_in_steps(launched, mask):
    weight = torch.randn(32, 64)
    packed, packed_t, scale = fp8_packed._cuda_pack_fp8(weight, mask, None)
    wanted = ops.pack_fp8(weight, mask, None)
    assert_bit_equal(scale, wanted[2])
    for buffer, expected, shape in ((packed, wanted[0], (32, 64)), (packed_t, wanted[1], (64, 32))):
        assert buffer.numel() == expected.numel()
        values = (_cuda_unpack(buffer, *shape, FP8), ops.unpack_fp8(expected, *shape))
        assert_bit_equal(*(value.float() + 0.0 for value in values))
    assert not launched
