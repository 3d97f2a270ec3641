"""The op of the sampled weight gradient in fp8: both ways to dW, and which one is taken."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from semisparse import check, ops
from semisparse.errors import ShapeError, TensorError
from semisparse.formats.layout import FP8
from semisparse.gemm.autotune import tiles
from semisparse.gemm.autotune.ways import SAMPLED
from semisparse.gemm.weight_gradient import WeightGradient
from semisparse.ops import fp8_sampled_grad
from semisparse.reference import fp8, mvue_fp8
from semisparse.testing import assert_bit_equal, small_integers
from tests.nn.fp8 import N as LAYER_N
from tests.nn.fp8 import fp8_inputs, fp8_layer

SEED = torch.tensor(-77)
BF16 = torch.bfloat16
N, K = 64, 96
on_the_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="here the CPU plays the device")


def operands(tokens: int, dtype: torch.dtype = BF16) -> tuple[Tensor, Tensor, Tensor]:
    """dy, and x in e4m3 with its scale; whole numbers of such sizes that sums are exact."""
    x8t, scale = ops.quantise(small_integers((tokens, K), seed=1), False, True)[1:]
    return small_integers((tokens, N), seed=3, limit=2, dtype=dtype), x8t, scale


def product(codes: Tensor, scale: Tensor, x8t: Tensor, scale_x: Tensor) -> Tensor:
    """(codes * scale)^T (x8 * scale_x), exact."""
    x = fp8.decode(x8t.view(torch.uint8)).double()[:, : codes.shape[0]]
    return (fp8.decode(codes).double() * scale).mT @ (x * scale_x).mT


def assert_gradients(found: tuple[Tensor, ...], given: tuple[Tensor, ...], dtype: torch.dtype, sampled: bool) -> None:
    """Those of the specification, shapes and memory as the op promises them."""
    gradient, x8t, scale_x = given
    grad_weight, bias, dy8, scale = found
    alone, _, expected_scale = ops.quantise(gradient, True, False)
    drawn = mvue_fp8.sample(gradient, SEED)
    codes = drawn.codes if sampled else alone.view(torch.uint8)[: len(gradient)]
    wanted = product(codes, drawn.scale if sampled else expected_scale, x8t, scale_x)
    assert_bit_equal(grad_weight + 0.0, wanted.to(dtype) + 0.0)
    assert_bit_equal(bias, gradient.sum(0, dtype=torch.float32))
    assert_bit_equal(dy8.view(torch.uint8), alone.view(torch.uint8))
    assert_bit_equal(scale, expected_scale)
    fake = fp8_sampled_grad._fake_fp8_sampled_grad_weight(
        gradient.to("meta"), x8t.to("meta"), scale_x, None, True, torch.float32, "auto", dtype
    )
    for real, promised in zip(found, fake, strict=True):
        assert (real.shape, real.stride(), real.dtype) == (promised.shape, promised.stride(), promised.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16], ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 13, 40])
def test_the_cpu_always_samples(tokens: int, dtype: torch.dtype) -> None:
    given = operands(tokens, dtype)
    found = ops.fp8_sampled_grad_weight(*given, SEED, True, torch.float32, "auto", dtype)
    assert_gradients(found, given, dtype, sampled=True)


@on_the_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16], ids=str)
@pytest.mark.parametrize("way", ["sampled", "whole"])
@pytest.mark.parametrize("tokens", [0, 1, 13, 40])
def test_cuda_takes_the_way_that_was_chosen(simulated_fp8, tokens: int, way: str, dtype: torch.dtype) -> None:
    """tests/nn/test_fp8_sampled.py has the mean of the sampled one, which is the other one."""
    given = operands(tokens)
    if tokens:
        asked = WeightGradient(tokens, N, K, BF16, dtype, bias=True)
        simulated_fp8._known[asked, -1] = replace(SAMPLED, algorithm=0 if way == "sampled" else None)
    call = fp8_sampled_grad._cuda_fp8_sampled_grad_weight
    sampled = way == "sampled" or not tokens  # of nothing both are zero
    assert_gradients(call(*given, SEED, True, torch.float32, "auto", dtype), given, dtype, sampled)
    for backend in ("cusparselt", "dense"):
        assert_gradients(call(*given, SEED, True, torch.float32, backend, dtype), given, dtype, sampled=True)
    nothing = call(*given, SEED, False, None, "cusparselt", dtype)
    assert nothing[1].numel() == nothing[2].numel() == 0


@on_the_cpu
def test_check_says_which_way_was_taken(simulated_fp8, monkeypatch) -> None:
    layer = fp8_layer(grad_output="mvue")
    monkeypatch.setattr(ops, "fp8_sampled_grad_weight", fp8_sampled_grad._cuda_fp8_sampled_grad_weight)
    monkeypatch.setitem(tiles.TILE, FP8, 1)  # 16 tokens are tuned
    x = fp8_inputs(16)[0]
    asked = WeightGradient(16, LAYER_N, x.shape[1], BF16, BF16, bias=True)
    for algorithm, said in (
        (None, "dense fp8 instead of a sampled dW (tuned)"),
        (0, "cuSPARSELt algorithm 0 (default)"),
    ):
        simulated_fp8._known[asked, -1] = replace(SAMPLED, algorithm=algorithm, source="tuned")
        (row,) = check(layer, x).rows
        assert row.backward == said


def test_opcheck() -> None:
    # Its test of the schema adds to the operands, which torch cannot do with e4m3.
    tests = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    arguments = (*operands(13), SEED, True, torch.float32, "auto", BF16)
    torch.library.opcheck(torch.ops.semisparse.fp8_sampled_grad_weight.default, arguments, test_utils=tests)


def test_what_does_not_fit_is_named() -> None:
    gradient, x8t, scale = operands(13)
    rest = scale, None, True, None, "auto", BF16
    with pytest.raises(ShapeError, match=r"x8t has shape \(96, 32\), .*must have 16 columns"):
        ops.fp8_sampled_grad_weight(gradient, torch.zeros(K, 32).to(FP8), *rest)
    with pytest.raises(TensorError, match=r"x8t is torch\.float32"):
        ops.fp8_sampled_grad_weight(gradient, torch.zeros(K, 16), *rest)
    with pytest.raises(TensorError, match="seed is"):
        ops.fp8_sampled_grad_weight(gradient, x8t, scale, torch.tensor(1.0), *rest[2:])
