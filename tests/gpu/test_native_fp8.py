"""C++ implements the ops of fp8 on CUDA: the bits of the Python implementations, in layers and graphs, too."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from semisparse import native, ops, tuning
from semisparse.formats.layout import FP8
from semisparse.gemm.autotune.autotuner import autotuner
from semisparse.gemm.autotune.ways import SAMPLED
from semisparse.gemm.dispatch import observed
from semisparse.gemm.weight_gradient import WeightGradient
from semisparse.ops import fp8, fp8_packed, fp8_sampled_grad, fp8_sampling
from semisparse.testing import assert_bit_equal
from tests.gpu.test_native import asked, pytestmark  # noqa: F401 - a fixture, and what all tests here need
from tests.nn.fp8 import MASKS, assert_results_equal, fp8_inputs, fp8_layer, run

modern = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="needs capability 8.9"
)
BF16 = torch.bfloat16
DTYPES = (torch.float32, torch.float16, BF16)
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
N, K = 352, 192


def natively(asked: list[str], name: str, *given: Any) -> tuple[Tensor, ...]:  # noqa: F811
    """The results of an op that was prepared; Python must not have seen the call."""
    call = getattr(ops, name)
    call(*given)
    asked.clear()
    found = call(*given)
    assert asked == []
    return found if isinstance(found, tuple) else (found,)


def assert_same(found: tuple[Tensor, ...], expected: Any) -> None:
    """Bit for bit: e4m3 as bytes."""
    for ours, wanted in zip(found, expected if isinstance(expected, tuple) else (expected,), strict=True):
        assert (ours.shape, ours.dtype, ours.is_contiguous()) == (wanted.shape, wanted.dtype, True)
        assert_bit_equal(*(one.view(torch.uint8) if one.dtype is FP8 else one for one in (ours, wanted)))


def codes(rows: int, columns: int) -> Tensor:
    return torch.randint(-4, 5, (rows, columns), device="cuda").float().to(FP8)


@EACH_DTYPE
@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)], ids=str)
def test_quantise(asked: list[str], wanted: tuple[bool, bool], dtype: torch.dtype) -> None:  # noqa: F811
    for rows, columns in ((1, 32), (13, 96), (64, 64), (5003, 528)):
        x = torch.randn(rows, 2 * columns, device="cuda").to(dtype)
        for matrix in (x, x[:, :columns], x[:, columns:].contiguous()):
            assert_same(natively(asked, "quantise", matrix, *wanted), fp8._cuda_quantise(matrix, *wanted))
        x[0, 3] = torch.nan
        assert_same(natively(asked, "quantise", x, *wanted), fp8._cuda_quantise(x, *wanted))


def test_what_kernels_read_from_a_copy_and_empty_matrices_are_pythons() -> None:
    x = torch.randn(64, 97, device="cuda")
    for matrix in (x[:, :96], x[:, 1:], x[:, :96].mT, x[:0, :96]):
        matrix = matrix[:, : matrix.shape[1] // 16 * 16]
        assert_same(ops.quantise(matrix, True, True), fp8._cuda_quantise(matrix, True, True))
        assert_same(ops.quantise(matrix, False, False), fp8._cuda_quantise(matrix, False, False))


@EACH_DTYPE
@pytest.mark.parametrize("mask", ["transposable", "row", "codes"])
def test_pack_and_unpack(asked: list[str], mask: str, dtype: torch.dtype) -> None:  # noqa: F811
    weight = torch.randn(N, 2 * K, device="cuda").to(dtype)
    for matrix in (weight, weight[:, :K]):
        held = ops.tile_codes(matrix.roll(1, 0), "transposable") if mask == "codes" else None
        given = matrix, "transposable" if mask == "codes" else mask, held
        packed, packed_t, scale = found = natively(asked, "pack_fp8", *given)
        assert_same(found, fp8_packed._cuda_pack_fp8(*given))
        assert (packed_t.numel() > 0, scale.shape) == (mask != "row", ())
        sizes = matrix.shape
        assert_same(natively(asked, "unpack_fp8", packed, *sizes), fp8_packed._cuda_unpack_fp8(packed, *sizes))


@modern
@pytest.mark.parametrize("out_dtype", [BF16, torch.float32], ids=str)
@pytest.mark.parametrize("backend", ["cusparselt", "dense"])
def test_product(asked: list[str], backend: str, out_dtype: torch.dtype) -> None:  # noqa: F811
    packed, _, _ = ops.pack_fp8(codes(N, K).to(BF16), "row", None)
    for tokens in (16, 208):
        given = codes(tokens, K), packed, N, backend, out_dtype
        before = native.started(), native.started_dense()
        expected = fp8_packed._cuda_fp8_product(*given)
        assert_same(natively(asked, "fp8_product", *given), expected)
        started = native.started() - before[0], native.started_dense() - before[1]
        assert started[backend == "dense"] > 0 and started[backend != "dense"] == 0


@modern
@EACH_DTYPE
def test_dense_product(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    ops.quantise(torch.randn(16, 32, device="cuda"), True, False)  # with the first launch Python connects the library
    a, b = (torch.tensor(scale, device="cuda") for scale in (0.25, 8.0))
    for scales in ((), (a, b), (a, None), (None, b)):
        given = codes(208, K), codes(N, K), dtype, *scales
        expected = fp8._cuda_dense_product(*given)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "_scaled_mm", None)  # what Python's implementation calls
            assert_same((ops.fp8_dense_product(*given),), expected)


@EACH_DTYPE
@pytest.mark.parametrize("bias", [*DTYPES, None], ids=str)
def test_rescale(asked: list[str], bias: torch.dtype | None, dtype: torch.dtype) -> None:  # noqa: F811
    a, b = (torch.tensor(scale, device="cuda") for scale in (0.25, 8.0))
    added = None if bias is None else torch.randn(N, device="cuda").to(bias)
    for given in (BF16, torch.float32):
        y = torch.randn(208, N, device="cuda").to(given)
        for rows in (208, 200):
            arguments = y, a, b, added, rows, dtype
            assert_same(natively(asked, "rescale", *arguments), fp8._cuda_rescale(*arguments))
    y = torch.randn(208, N, device="cuda").to(dtype)
    expected = fp8._cuda_rescale(y, a, b, added, 208, dtype)
    asked.clear()
    assert ops.rescale_(y, a, b, added) is None
    assert asked == []  # rescale prepared it
    assert_bit_equal(y, expected)


@EACH_DTYPE
def test_sample(asked: list[str], dtype: torch.dtype) -> None:  # noqa: F811
    seed = torch.tensor(-7, device="cuda")
    # Each combination of what is asked for is a kernel of its own, which takes Triton seconds.
    for tokens, columns, asks in (
        (1, slice(0, N), (seed, True, torch.float32)),
        (13, slice(0, None), (seed, True, None)),
        (32, slice(N, None), (None, False, BF16)),
        (5003, slice(0, N), (seed, True, torch.float32)),
        (5003, slice(0, None), (seed, True, None)),
    ):
        wide = torch.randn(tokens, 2 * N, device="cuda").to(dtype)
        for dy in (wide[:, columns], wide[:, columns].contiguous()):
            assert_same(natively(asked, "sample_fp8", dy, *asks), fp8_sampling._cuda_sample_fp8(dy, *asks))
    dy = wide.mT.contiguous().mT
    assert_same(ops.sample_fp8(dy, seed, True, None), fp8_sampling._cuda_sample_fp8(dy, seed, True, None))


@modern
@pytest.mark.parametrize("out_dtype", [BF16, torch.float32], ids=str)
@pytest.mark.parametrize("backend", ["cusparselt", "dense"])
def test_sampled_product(asked: list[str], backend: str, out_dtype: torch.dtype) -> None:  # noqa: F811
    for tokens in (32, 224):
        packed = ops.sample_fp8(codes(tokens, N).to(BF16), None, False, None)[1]
        given = packed, codes(K, tokens), N, backend, out_dtype
        before = native.started(), native.started_dense()
        expected = fp8_sampling._cuda_fp8_sampled_product(*given)
        assert_same(natively(asked, "fp8_sampled_product", *given), expected)
        started = native.started() - before[0], native.started_dense() - before[1]
        assert started[backend == "dense"] > 0 and started[backend != "dense"] == 0


@modern
@EACH_DTYPE
@pytest.mark.parametrize("bias", [torch.float32, None], ids=str)
@pytest.mark.parametrize("way", ["sampled", "whole", "cusparselt"])
def test_sampled_weight_gradient(
    asked: list[str],  # noqa: F811
    way: str,
    bias: torch.dtype | None,
    dtype: torch.dtype,
) -> None:
    backend, scale = "auto" if way != "cusparselt" else way, torch.tensor(0.25, device="cuda")
    state = tuning.state()
    for tokens in (20, 32, 224):
        for out_dtype in (dtype, torch.float16):
            asking = WeightGradient(tokens, N, K, dtype, out_dtype, bias is not None)
            choice = replace(SAMPLED, algorithm=None if way == "whole" else 0)
            entry = {"key": autotuner().key(asking, 0), "choice": choice.to_record()}
            tuning.load_state({"schema": 1, "choices": [entry]})
            dy = codes(tokens, N).to(dtype)
            given = dy, codes(K, -(-tokens // 16) * 16), scale, None, True, bias, backend, out_dtype
            expected = fp8_sampled_grad._cuda_fp8_sampled_grad_weight(*given)
            assert_same(natively(asked, "fp8_sampled_grad_weight", *given), expected)
    autotuner()._measured.clear()
    tuning.load_state(state)


@modern
@pytest.mark.parametrize("mask", MASKS)
def test_a_layer_asks_python_for_nothing_and_computes_the_same(
    asked: list[str],  # noqa: F811
    mask: str | None,
) -> None:
    layer = fp8_layer(mask, backend="cusparselt" if mask else "auto").cuda()
    for tokens in (16, 13):
        x, dy = (one.cuda() for one in fp8_inputs(tokens))
        with observed(lambda *_: None):  # which Python alone tells
            expected = run(layer, x, dy)
        run(layer, x, dy)
        asked.clear()
        assert_results_equal(run(layer, x, dy), expected)
        assert asked == [] or mask == "greedy"  # which no kernel packs


@modern
def test_a_replayed_graph_reads_what_is_there_then(asked: list[str]) -> None:  # noqa: F811
    weight, x = torch.randn(N, K, device="cuda"), torch.randn(224, K, device="cuda").to(BF16)

    def all_ops() -> tuple[Tensor, ...]:
        packed, _, scale_w = ops.pack_fp8(weight, "transposable", None)
        x8, x8t, scale_x = ops.quantise(x, True, True)
        sums = ops.fp8_product(x8, packed, N, "cusparselt", BF16)
        y = ops.rescale(sums, scale_x, scale_w, None, 224, BF16)
        ops.rescale_(sums, scale_x, scale_w, None)
        dense = ops.fp8_dense_product(x8t, x8t, torch.float32, scale_x, None)
        gradients = ops.fp8_sampled_grad_weight(y, x8t, scale_x, None, True, torch.float32, "cusparselt", BF16)
        return y, sums, dense, *gradients

    all_ops()
    graph = torch.cuda.CUDAGraph()
    asked.clear()
    with torch.cuda.graph(graph):
        found = all_ops()
    assert asked == []
    for seed in range(2):
        torch.manual_seed(seed)
        x.copy_(torch.randn(224, K))
        weight.copy_(torch.randn(N, K))
        graph.replay()
        with observed(lambda *_: None):
            assert_same(found, all_ops())
