"""precision="fp8" on a GPU: the CPU's bits on whole numbers, in eager, compiled and captured steps."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from semisparse import SemiSparseLinear, check, ops
from semisparse.testing import assert_bit_equal
from tests.nn.fp8 import MASKS, Fp8Result, assert_results_equal, by_equations, fp8_inputs, fp8_layer, run

# PyTorch starts each pool of graphs with an empty one, and warns of it. The second: a cuBLAS product as the first CUDA
# call of its autograd thread.
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:The CUDA Graph is empty"),
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS, but there was no current"),
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="capability below 8.9"
    ),
]

BF16 = torch.bfloat16
PACKED_MASKS = [mask for mask in MASKS if mask is not None]
KERNEL_MASKS = ["transposable", "row"]


def compare(layer: SemiSparseLinear, x: Tensor, dy: Tensor, call: Callable[..., Any] | None = None, **how: Any) -> None:
    """The layer on the GPU against the equations on the CPU."""
    there = copy.deepcopy(layer).cuda()
    found = run(there, x.cuda(), dy.cuda(), None if call is None else call(there))
    moved = Fp8Result(*(None if one is None else one.cpu() for one in found))
    assert_results_equal(moved, by_equations(layer, x, dy, **how))


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16], ids=str)
@pytest.mark.parametrize("mask", PACKED_MASKS)
@pytest.mark.parametrize("shape", [(32, 32), (96, 352), (192, 160), (1024, 4096)], ids=str)
def test_buffers_are_those_of_the_cpu(shape: tuple[int, int], mask: str, dtype: torch.dtype) -> None:
    weight = torch.randn(shape, dtype=dtype)
    ours, expected = ops.pack_fp8(weight.cuda(), mask, None), ops.pack_fp8(weight, mask, None)
    assert_bit_equal(ours[2].cpu(), expected[2])
    for found, wanted, sizes in zip(ours[:2], expected[:2], (shape, shape[::-1]), strict=True):
        if mask in KERNEL_MASKS:  # the compressor goes by values, and may find other zeros than those of the mask
            assert_bit_equal(found.cpu(), wanted)
        if wanted.numel():
            values = ops.unpack_fp8(found, *sizes).float().cpu()
            assert_bit_equal(values + 0.0, ops.unpack_fp8(wanted, *sizes).float() + 0.0)


@pytest.mark.parametrize("backend", ["auto", "cusparselt", "dense"])
@pytest.mark.parametrize("mask", PACKED_MASKS)
@pytest.mark.parametrize("leading", [(0,), (1,), (13,), (2, 8), (200,)], ids=str)
def test_a_layer_computes_the_equations(leading: tuple[int, ...], mask: str, backend: str) -> None:
    compare(fp8_layer(mask, backend=backend), *fp8_inputs(*leading))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("mask", [None, "transposable"])
@pytest.mark.parametrize("tokens", [0, 1, 13, 200])
def test_dense_layers_and_dense_phases(tokens: int, mask: str | None, bias: bool) -> None:
    layer = fp8_layer(mask, bias=bias)
    layer.sparse_enabled = False
    compare(layer, *fp8_inputs(tokens), dense=True)


@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
def test_fp32_parameters_under_autocast(dtype: torch.dtype) -> None:
    layer, (x, dy) = fp8_layer(dtype=torch.float32), fp8_inputs(13, dtype=torch.float32, grad_dtype=dtype)
    with torch.autocast("cuda", dtype):
        compare(layer, x / 1024, dy / 1024)


@pytest.mark.parametrize("mask", MASKS)
def test_compiled_without_graph_breaks(mask: str | None) -> None:
    torch._dynamo.reset()
    compare(fp8_layer(mask), *fp8_inputs(13), call=lambda layer: torch.compile(layer, fullgraph=True))


@pytest.mark.parametrize("mask", MASKS)
def test_a_captured_step_reads_the_input_and_the_weight_of_each_replay(mask: str | None) -> None:
    layer, (x, dy) = fp8_layer(mask), fp8_inputs(16)
    there, static, gradient = copy.deepcopy(layer).cuda(), x.cuda().requires_grad_(), dy.cuda()
    model = nn.Sequential(there)

    def step() -> Tensor:
        y = model(static)
        y.backward(gradient)
        return y

    for _ in range(2):
        step()
    static.grad = None
    there.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step()
    with torch.no_grad():
        for factor in (2, -1):
            static.mul_(factor)
            there.weight.mul_(factor)
            layer.weight.mul_(factor)
            x = x * factor
            graph.replay()
            expected = by_equations(layer, x, dy)
            found = Fp8Result(y, static.grad, there.weight.grad, there.bias.grad)
            assert_results_equal(Fp8Result(*(one.detach().cpu() for one in found)), expected)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_nothing_synchronises() -> None:
    layer, (x, dy) = fp8_layer().cuda(), fp8_inputs(16)
    x, dy = x.cuda().requires_grad_(), dy.cuda()
    layer(x).backward(dy)
    try:
        torch.cuda.set_sync_debug_mode("error")
        layer(x).backward(dy)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_check_tells_what_ran() -> None:
    x = fp8_inputs(16)[0].cuda().requires_grad_()
    (row,) = check(fp8_layer(backend="cusparselt").cuda(), x).rows
    assert "cuSPARSELt algorithm" in row.forward
    assert "cuSPARSELt algorithm" in row.backward
