"""The CUDA side's ways through tile_codes, prune and pack, on the CPU: its kernels run in Triton's interpreter."""

from types import SimpleNamespace

import pytest
import torch

from semisparse import masks, ops
from semisparse.errors import ConfigError
from semisparse.formats.layout import SM90_16BIT
from semisparse.formats.packed import PackedFormat
from semisparse.kernels import prune_pack, tile_codes
from semisparse.ops import packing as ops_packing
from semisparse.ops.masks import _cuda_prune, _cuda_tile_codes
from semisparse.ops.packing import _cuda_pack, _cuda_pack_tokens, _cuda_pack_transpose
from semisparse.reference import packing
from semisparse.testing import assert_bit_equal
from tests.support import MaskArguments

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels of CPU tensors need the interpreter")

CHOSEN = tuple(masks.MASKS)
BY_PACK_KERNEL = ("transposable", "row", "codes", "soft")
GREEDY = ("greedy", "signed_greedy")


@pytest.fixture
def launches(monkeypatch):
    """Masks of the kernels that were launched, as (kernel, mask)."""
    seen = []

    def watch(kernel):
        launch = kernel.launch

        def watched(*args, mask, **kwargs):
            seen.append((kernel.__name__.rpartition(".")[2], mask))
            launch(*args, mask=mask, **kwargs)

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
    monkeypatch.setattr(ops_packing, "engine", lambda: engine)
    simulated = PackedFormat("kernel", SM90_16BIT, "simulated")
    monkeypatch.setattr(ops_packing, "packed_format", lambda *_: simulated)
    return seen if request.param else None


def arguments_for(setting):
    if setting == "codes":
        return MaskArguments("transposable", ops.tile_codes(torch.randn(32, 48), "transposable"))
    return MaskArguments(setting, scale=torch.tensor(1.1875) if setting == "soft" else None)


@pytest.mark.parametrize("mask", CHOSEN)
def test_masks_are_chosen_by_the_kernel_but_for_fp64(launches, mask):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        matrix = torch.randn(20, 36).to(dtype)
        assert_bit_equal(_cuda_tile_codes(matrix, mask), ops.tile_codes(matrix, mask))
        if mask != "soft":
            assert_bit_equal(_cuda_prune(matrix, dtype, mask), ops.prune(matrix, dtype, mask))
    assert launches == [("tile_codes", mask)] * (3 if mask == "soft" else 6)
    launches.clear()
    matrix = torch.randn(20, 36, dtype=torch.float64)
    assert_bit_equal(_cuda_tile_codes(matrix, mask), ops.tile_codes(matrix, mask))
    if mask != "soft":
        assert_bit_equal(_cuda_prune(matrix, torch.float32, mask), ops.prune(matrix, torch.float32, mask))
    assert not launches


def test_a_row_mask_of_rows_that_fill_no_tile_is_the_references(launches):
    matrix = torch.randn(7, 36)
    assert_bit_equal(_cuda_prune(matrix, torch.float32, "row"), ops.prune(matrix, torch.float32, "row"))
    assert not launches


@pytest.mark.parametrize("setting", ["codes", "soft"])
def test_what_is_held_needs_no_kernel_to_be_pruned(launches, setting):
    matrix, given = torch.randn(32, 48), arguments_for(setting)
    expected = ops.prune(matrix, torch.bfloat16, *given)
    assert_bit_equal(_cuda_prune(matrix, torch.bfloat16, *given), expected)
    assert not launches


@pytest.mark.parametrize("setting", [*BY_PACK_KERNEL, *GREEDY])
def test_packing_gives_the_cpus_values_and_greedy_tiles_never_reach_the_pack_kernel(launches, compressed, setting):
    given, dtype = arguments_for(setting), torch.bfloat16
    for matrix in (torch.randn(32, 48), torch.randint(-3, 4, (32, 48)).half(), torch.randn(48, 32).mT):
        launches.clear()
        ours = _cuda_pack(matrix, dtype, *given)
        expected = ops.pack(matrix, dtype, *given)
        assert launches == [("tile_codes" if setting in GREEDY else "prune_pack", given.mask)]
        for found, wanted, shape in zip(ours, expected, ((32, 48), (48, 32)), strict=True):
            assert found.numel() == wanted.numel()
            if wanted.numel():
                assert_bit_equal(*(ops.unpack(buffer, *shape, dtype) for buffer in (found, wanted)))
    if compressed is not None:
        assert len(compressed) == (6 if setting in GREEDY else 0)


@pytest.mark.parametrize("setting", ["transposable", "codes", *GREEDY])
def test_the_transpose_alone_is_packed_by_what_packs_both(launches, compressed, setting):
    given, dtype = arguments_for(setting), torch.bfloat16
    for matrix in (torch.randn(32, 48), torch.randint(-3, 4, (32, 48)).half(), torch.randn(48, 32).mT):
        both = _cuda_pack(matrix, dtype, *given)[1]
        ways = launches[:], len(compressed or ())
        launches.clear()
        if compressed is not None:
            compressed.clear()
        alone = _cuda_pack_transpose(matrix, dtype, *given)
        assert_bit_equal(*(ops.unpack(buffer, 48, 32, dtype) for buffer in (alone, both)))
        assert alone.numel() == both.numel()
        assert (launches, 2 * len(compressed or ())) == ways
        launches.clear()
        if compressed is not None:
            compressed.clear()
    for mask in ("row", "soft"):
        with pytest.raises(ConfigError, match="2:4 along the columns only"):
            _cuda_pack_transpose(matrix, dtype, *arguments_for(mask))


def test_no_tokens_take_as_many_bytes_as_on_the_cpu_all_of_them_padding(compressed):
    x = torch.randn(0, 48).bfloat16()
    found, expected = _cuda_pack_tokens(x, torch.bfloat16), ops.pack_tokens(x, torch.bfloat16)
    assert [buffer.numel() for buffer in found] == [512, 0]
    for ours, wanted in zip(found, expected, strict=True):
        assert_bit_equal(ours, wanted)
    for ours, wanted in zip(found, torch.ops.semisparse.pack_tokens(x.to("meta"), torch.bfloat16), strict=True):
        assert ours.shape == wanted.shape
