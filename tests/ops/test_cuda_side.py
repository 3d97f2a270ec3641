"""The CUDA side's ways through tile_codes, prune and pack, on the CPU: its kernels run in Triton's interpreter."""

from types import SimpleNamespace

import pytest
import torch

from semisparse import cpu_ops, cuda_ops
from semisparse.formats.layout import SM90_16BIT
from semisparse.formats.packed import PackedFormat
from semisparse.kernels import prune_pack, tile_codes
from semisparse.reference import packing
from semisparse.testing import assert_bit_equal

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels of CPU tensors need the interpreter")

CHOSEN = tile_codes.MODES
BY_PACK_KERNEL = ("transposable", "row", "codes", "soft")
GREEDY = ("greedy", "signed_greedy")


@pytest.fixture
def launches(monkeypatch):
    """Modes of the kernels that were launched, as (kernel, mode)."""
    seen = []

    def watch(kernel):
        launch = kernel.launch

        def watched(*args, mode, **kwargs):
            seen.append((kernel.__name__.rpartition(".")[2], mode))
            launch(*args, mode=mode, **kwargs)

        monkeypatch.setattr(kernel, "launch", watched)

    watch(tile_codes)
    watch(prune_pack)
    return seen


@pytest.fixture(params=[True, False], ids=["engine", "no engine"])
def compressed(request, monkeypatch):
    """What the engine's compressor was given, where there is an engine; it writes as the reference does."""
    seen = []

    def compress(pruned, check):
        assert not check  # it would wait for the device
        seen.append(pruned)
        return SM90_16BIT.encode(packing.pack(pruned, pruned != 0))

    engine = SimpleNamespace(available=lambda index: SimpleNamespace(ok=request.param), compress=compress)
    monkeypatch.setattr(cuda_ops, "engine", lambda: engine)
    monkeypatch.setattr(cuda_ops, "packed_format", lambda *_: PackedFormat("kernel", SM90_16BIT, "simulated"))
    return seen if request.param else None


def frozen_for(mask):
    if mask == "codes":
        return cpu_ops.tile_codes(torch.randn(32, 48), "transposable")
    return torch.tensor(1.1875) if mask == "soft" else None


@pytest.mark.parametrize("mask", CHOSEN)
def test_masks_are_chosen_by_the_kernel_but_for_fp64(launches, mask):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        matrix = torch.randn(20, 36).to(dtype)
        assert_bit_equal(cuda_ops.tile_codes(matrix, mask), cpu_ops.tile_codes(matrix, mask))
        assert_bit_equal(cuda_ops.prune(matrix, dtype, mask), cpu_ops.prune(matrix, dtype, mask))
    assert launches == [("tile_codes", mask)] * 6
    matrix = torch.randn(20, 36, dtype=torch.float64)
    assert_bit_equal(cuda_ops.tile_codes(matrix, mask), cpu_ops.tile_codes(matrix, mask))
    assert_bit_equal(cuda_ops.prune(matrix, torch.float32, mask), cpu_ops.prune(matrix, torch.float32, mask))
    assert len(launches) == 6


def test_a_row_mask_of_rows_that_fill_no_tile_is_the_references(launches):
    matrix = torch.randn(7, 36)
    assert_bit_equal(cuda_ops.prune(matrix, torch.float32, "row"), cpu_ops.prune(matrix, torch.float32, "row"))
    assert not launches


@pytest.mark.parametrize("mask", ["codes", "soft"])
def test_what_is_frozen_needs_no_kernel_to_be_pruned(launches, mask):
    matrix, frozen = torch.randn(32, 48), frozen_for(mask)
    expected = cpu_ops.prune(matrix, torch.bfloat16, mask, frozen)
    assert_bit_equal(cuda_ops.prune(matrix, torch.bfloat16, mask, frozen), expected)
    assert not launches


@pytest.mark.parametrize("mask", [*BY_PACK_KERNEL, *GREEDY])
def test_packing_gives_the_cpus_values_and_greedy_tiles_never_reach_the_pack_kernel(launches, compressed, mask):
    frozen, dtype = frozen_for(mask), torch.bfloat16
    for matrix in (torch.randn(32, 48), torch.randint(-3, 4, (32, 48)).half(), torch.randn(48, 32).mT):
        launches.clear()
        ours = cuda_ops.pack(matrix, dtype, mask, frozen)
        expected = cpu_ops.pack(matrix, dtype, mask, frozen)
        assert launches == [("tile_codes" if mask in GREEDY else "prune_pack", mask)]
        for found, wanted, shape in zip(ours, expected, ((32, 48), (48, 32)), strict=True):
            assert found.numel() == wanted.numel()
            if wanted.numel():
                assert_bit_equal(*(cpu_ops.unpack(buffer, *shape, dtype) for buffer in (found, wanted)))
    if compressed is not None:
        assert len(compressed) == (6 if mask in GREEDY else 0)
