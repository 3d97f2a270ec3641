"""The ops of "mvue" in fp8: the specification's sample, on the CPU and, with the simulated library, on CUDA."""

import pytest
import torch
from torch import Tensor

from semisparse import ops
from semisparse.errors import ShapeError, TensorError
from semisparse.formats.layout import SM90_8BIT, packed_bytes
from semisparse.formats.packed import PackedFormat
from semisparse.ops import fp8_sampling
from semisparse.reference import fp8, mvue_fp8
from semisparse.testing import assert_bit_equal, small_integers

SEED = torch.tensor(-77)
TOKENS = [0, 1, 13, 40]
BF16 = torch.bfloat16
N, K = 64, 96
on_the_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="here the CPU plays the device")


def gradient_of(tokens: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(tokens, N, generator=torch.Generator().manual_seed(tokens)).to(dtype)


def codes_of(packed: Tensor, tokens: int) -> Tensor:
    return ops.unpack_fp8(packed, N, -(-tokens // 32) * 32).view(torch.uint8)[:, :tokens].mT


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # read by torch 2.15's opcheck
def test_opcheck() -> None:
    gradient = gradient_of(13)
    torch.library.opcheck(torch.ops.semisparse.sample_fp8.default, (gradient, SEED, True, torch.float32))
    packed = ops.sample_fp8(gradient, SEED, False, None)[1]
    x8t = ops.quantise(torch.randn(13, K), False, True)[1]
    product = torch.ops.semisparse.fp8_sampled_product.default
    # Its test of the schema adds to the operands, which torch cannot do with e4m3.
    tests = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(product, (packed, x8t, N, "auto", torch.float32), test_utils=tests)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16], ids=str)
@pytest.mark.parametrize("tokens", TOKENS)
def test_it_is_the_specification(tokens: int, dtype: torch.dtype) -> None:
    gradient = gradient_of(tokens, dtype)
    dy8, packed, bias, scale, scale_sample = ops.sample_fp8(gradient, SEED, True, torch.float32)
    padded, drawn = -(-tokens // 32) * 32, mvue_fp8.sample(gradient, SEED)
    assert dy8.shape == (padded, N)
    assert packed.numel() == packed_bytes(N, padded, 1)
    alone, _, expected_scale = ops.quantise(gradient, True, False)
    assert_bit_equal(dy8.view(torch.uint8)[: alone.shape[0]], alone.view(torch.uint8))
    assert not dy8.view(torch.uint8)[tokens:].any()
    assert_bit_equal(codes_of(packed, tokens), drawn.codes)
    assert_bit_equal(bias, gradient.sum(0, dtype=torch.float32))
    assert_bit_equal(scale, expected_scale)
    assert_bit_equal(scale_sample, drawn.scale)
    assert_bit_equal(scale_sample, 2 * scale)
    nothing = ops.sample_fp8(gradient, None, False, None)
    assert nothing[0].numel() == nothing[2].numel() == 0
    assert_bit_equal(codes_of(nothing[1], tokens), mvue_fp8.sample(gradient, 0).codes)


@on_the_cpu
@pytest.mark.parametrize("packer", ["kernel", "reference"])
def test_cuda_computes_the_same_by_the_kernels_and_without_them(packer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    written = PackedFormat(packer, SM90_8BIT, "a test's")  # type: ignore[arg-type]
    monkeypatch.setattr(fp8_sampling, "packed_format", lambda *_: written)
    gradient = small_integers((40, N), seed=1, dtype=BF16)
    for given, bias_dtype in ((gradient.mT.contiguous().mT, torch.float32), (gradient[:0], BF16)):
        found = fp8_sampling._cuda_sample_fp8(given, SEED, True, bias_dtype)
        wanted = ops.sample_fp8(given, SEED, True, bias_dtype)
        for place in (0, 2, 3, 4):
            ours, expected = (each[place] for each in (found, wanted))
            assert_bit_equal(*(one.view(torch.uint8) if place == 0 else one for one in (ours, expected)))
        assert_bit_equal(codes_of(found[1], len(given)) & 0x7F, codes_of(wanted[1], len(given)) & 0x7F)


@on_the_cpu
@pytest.mark.parametrize("out_dtype", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize("backend", ["cusparselt", "dense"])
@pytest.mark.parametrize("tokens", TOKENS)
def test_the_product_is_that_with_the_sample(simulated_fp8, tokens: int, backend: str, out_dtype: torch.dtype) -> None:
    gradient = small_integers((tokens, N), seed=3, limit=2, dtype=BF16)
    x8t = ops.quantise(small_integers((tokens, K), seed=1), False, True)[1]
    packed = fp8_sampling._cuda_sample_fp8(gradient, SEED, False, None)[1]
    found = fp8_sampling._cuda_fp8_sampled_product(packed, x8t, N, backend, out_dtype)
    drawn = fp8.decode(mvue_fp8.sample(gradient, SEED).codes).double()
    exact = drawn.mT @ fp8.decode(x8t.view(torch.uint8)).double()[:, :tokens].mT
    assert_bit_equal(found + 0.0, exact.to(out_dtype) + 0.0)
    on_cpu = ops.sample_fp8(gradient, SEED, False, None)[1]
    assert_bit_equal(ops.fp8_sampled_product(on_cpu, x8t, N, backend, out_dtype) + 0.0, found + 0.0)


def test_tokens_that_need_no_padding_are_not_copied() -> None:
    x8t = ops.quantise(torch.randn(64, K), False, True)[1]
    assert fp8_sampling._pad(x8t, (0, 0)).data_ptr() == x8t.data_ptr()
    assert fp8_sampling._pad(x8t, (0, 16)).shape == (K, 80)


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ShapeError, match=r"grad_output has shape \(4, 48\); .*multiple of 32"):
        ops.sample_fp8(torch.zeros(4, 48), None, True, None)
    with pytest.raises(TensorError, match=r"grad_output is torch\.float64"):
        ops.sample_fp8(torch.zeros(4, 32, dtype=torch.float64), None, True, None)
    with pytest.raises(TensorError, match=r"seed is .*must be int64 without dimensions"):
        ops.sample_fp8(torch.zeros(4, 32), torch.tensor(1.0), True, None)
    packed = ops.sample_fp8(torch.zeros(32, N), None, False, None)[1]
    with pytest.raises(ShapeError, match=r"packed has \d+ bytes; 64 x 64"):
        ops.fp8_sampled_product(packed, torch.zeros(K, 64).to(torch.float8_e4m3fn), N, "auto", BF16)
    with pytest.raises(TensorError, match="x8t is"):
        ops.fp8_sampled_product(packed, torch.zeros(K, 32), N, "auto", BF16)
