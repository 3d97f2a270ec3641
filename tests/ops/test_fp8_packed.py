"""Ops of weights packed in fp8, against the specification: masks, rounding, and the 8-bit format."""

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from semisparse import masks, ops
from semisparse.errors import ConfigError, ShapeError
from semisparse.formats.layout import SM90_8BIT, lengthened, packed_bytes
from semisparse.formats.packed import PackedFormat
from semisparse.ops import fp8_packed
from semisparse.reference import fp8, packing
from semisparse.reference import linear as reference
from semisparse.reference.masks import to_codes
from semisparse.testing import assert_bit_equal, small_integers

SHAPES = [(32, 32), (96, 352), (192, 160), (64, 128)]
MASKS = [name for name, mask in masks.MASKS.items() if not mask.needs_scale]


def weight_of(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, columns, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_buffers_hold_the_rounded_kept_values_both_ways(
    shape: tuple[int, int], mask: str, dtype: torch.dtype
) -> None:
    weight = weight_of(*shape, dtype=dtype)
    packed, packed_t, scale = ops.pack_fp8(weight, mask, None)
    multiplier = fp8.multiplier_for(fp8.largest_magnitude(weight))
    assert_bit_equal(scale, 1 / multiplier)
    kept = masks.get(mask).choose(weight)
    codes = torch.where(kept, fp8.quantise(weight, multiplier).view(torch.uint8), 0)
    assert_bit_equal(ops.unpack_fp8(packed, *shape).view(torch.uint8), codes)
    if masks.get(mask).both_ways:
        assert_bit_equal(ops.unpack_fp8(packed_t, *shape[::-1]).view(torch.uint8), codes.mT.contiguous())
        assert_bit_equal(packed_t, lengthened(SM90_8BIT.encode(packing.pack(codes.mT, kept.mT)), *shape[::-1], 1))
    else:
        assert packed_t.shape == (0,)
    assert_bit_equal(packed, lengthened(SM90_8BIT.encode(packing.pack(codes, kept)), *shape, 1))
    assert packed.numel() == packed_bytes(*shape, 1)


@pytest.mark.parametrize("packer", ["kernel", "reference"])
@pytest.mark.parametrize("mask", MASKS)
def test_cuda_computes_the_same_by_the_kernels_and_without_them(
    mask: str, packer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = PackedFormat(packer, SM90_8BIT, "a test's")  # type: ignore[arg-type]
    monkeypatch.setattr(fp8_packed, "packed_format", lambda *_: written)
    for weight in (weight_of(96, 64), weight_of(64, 96, torch.bfloat16).mT, weight_of(96, 65)[:, 1:]):
        found, expected = fp8_packed._cuda_pack_fp8(weight, mask, None), ops.pack_fp8(weight, mask, None)
        assert_bit_equal(found[2], expected[2])
        if packer == "kernel" and masks.get(mask).chosen_while_packing:
            for ours, wanted in zip(found[:2], expected[:2], strict=True):
                assert_bit_equal(ours, wanted)
            continue
        # Packed in steps, a zero that the mask keeps counts as dropped, which gives other nibbles for the same matrix.
        for ours, wanted, shape in zip(found[:2], expected[:2], ((96, 64), (64, 96)), strict=True):
            assert ours.shape == wanted.shape
            if wanted.numel():
                assert_bit_equal(*(ops.unpack_fp8(buffer, *shape).view(torch.uint8) for buffer in (ours, wanted)))
    kept = masks.get("transposable").choose(weight).flip(0)
    codes = to_codes(kept).to(torch.int16)
    if mask == "transposable":  # of fp32 numbers, none of which is zero
        found, expected = fp8_packed._cuda_pack_fp8(weight, mask, codes), ops.pack_fp8(weight, mask, codes)
        for ours, wanted in zip(found[:2], expected[:2], strict=True):
            assert_bit_equal(ours, wanted)
        assert_bit_equal(found[2], expected[2])


def test_strides_do_not_matter_and_codes_replace_the_choice() -> None:
    weight = weight_of(96, 64)
    for ours, expected in zip(
        ops.pack_fp8(weight.mT.contiguous().mT, "transposable", None),
        ops.pack_fp8(weight, "transposable", None),
        strict=True,
    ):
        assert_bit_equal(ours, expected)
    kept = masks.get("transposable").choose(weight).flip(0)
    packed, packed_t, _ = ops.pack_fp8(weight, "transposable", to_codes(kept).to(torch.int16))
    unpacked = ops.unpack_fp8(packed, 96, 64).view(torch.uint8)
    assert bool((unpacked[~kept] == 0).all())
    assert_bit_equal(ops.unpack_fp8(packed_t, 64, 96).view(torch.uint8), unpacked.mT.contiguous())
    assert int((unpacked != 0).sum()) > 0.9 * int(kept.sum())


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["auto", "dense"])
@pytest.mark.parametrize("tokens", [0, 16, 48])
def test_the_product_is_that_of_what_is_packed(tokens: int, backend: str, out_dtype: torch.dtype) -> None:
    weight, x = small_integers((96, 64), seed=1, limit=300), small_integers((tokens, 64), seed=2, limit=300)
    packed, _, _ = ops.pack_fp8(weight, "row", None)
    x8, _, _ = ops.quantise(x, True, False)
    wanted = reference.quantised(x).values @ reference.quantised(weight, masks.get("row").choose(weight)).values.mT
    found = ops.fp8_product(x8, packed, 96, backend, out_dtype)  # type: ignore[arg-type]
    assert_bit_equal(found + 0.0, wanted.to(out_dtype) + 0.0)


def test_what_is_not_finite_makes_the_scale_nan() -> None:
    weight = weight_of(32, 32)
    weight[3, 4] = torch.inf
    packed, _, scale = ops.pack_fp8(weight, "transposable", None)
    assert scale.isnan()
    assert not reference.quantised(weight).scale.isfinite()
    kept = masks.get("transposable").choose(weight)
    assert bool(ops.unpack_fp8(packed, 32, 32).float()[kept].isnan().all())


def test_fakes_tell_shapes_and_dtypes() -> None:
    for shape in SHAPES:
        weight = weight_of(*shape)
        for mask in MASKS:
            real, fake = (ops.pack_fp8(w, mask, None) for w in (weight, weight.to("meta")))
            assert [(t.shape, t.dtype) for t in real] == [(t.shape, t.dtype) for t in fake]
        unpacked = ops.unpack_fp8(fake[0], *shape)
        assert (unpacked.shape, unpacked.dtype, unpacked.device.type) == (shape, torch.float8_e4m3fn, "meta")


def test_what_cannot_be_packed_is_named() -> None:
    with pytest.raises(ShapeError, match=r"weight is \(48, 64\); packing in fp8 needs multiples of 32"):
        ops.pack_fp8(weight_of(48, 64), "row", None)
    with pytest.raises(ConfigError, match="mask='soft' needs its scale"):
        ops.pack_fp8(weight_of(32, 32), "soft", None)
    with pytest.raises(ConfigError, match="cannot be given as codes"):
        ops.pack_fp8(weight_of(32, 32), "row", torch.zeros(8, 8, dtype=torch.int16))


@pytest.mark.parametrize(
    ("given", "rows", "dtype", "again"),
    [(torch.bfloat16, 16, torch.bfloat16, True), (torch.float32, 16, torch.float32, True),
     (torch.bfloat16, 13, torch.bfloat16, False), (torch.float32, 16, torch.float16, False)],
)  # fmt: skip
def test_an_eager_result_takes_the_memory_of_its_sums_where_it_fits(
    given: torch.dtype, rows: int, dtype: torch.dtype, again: bool
) -> None:
    sums, scale, bias = torch.randn(16, 32).to(given), torch.tensor(0.25), torch.randn(32)
    expected = ops.rescale(sums, scale, scale, bias, rows, dtype)
    with FlopCounterMode(display=False):  # a dispatch mode, which may have kept the sums
        assert fp8_packed.rescaled(sums, scale, scale, bias, rows, dtype).data_ptr() != sums.data_ptr()
    found = fp8_packed.rescaled(sums, scale, scale, bias, rows, dtype)
    assert_bit_equal(found, expected)
    assert (found.data_ptr() == sums.data_ptr()) == again
