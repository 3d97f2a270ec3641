"""fp8 with grad_output="mvue" on a GPU: the specification's sample, in eager, compiled and captured steps."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from semisparse import SemiSparseLinear, SparseConfig, check, native, ops, tuning
from semisparse.errors import EngineError
from semisparse.gemm import dispatch
from semisparse.gemm.autotune.autotuner import Autotuner, autotuner
from semisparse.gemm.autotune.ways import SAMPLED
from semisparse.gemm.engine import engine
from semisparse.gemm.weight_gradient import WeightGradient
from semisparse.ops import prepare
from semisparse.reference import linear as reference
from semisparse.reference import mvue_fp8
from semisparse.testing import assert_as_good_as_torch, assert_bit_equal
from tests.nn.fp8 import Fp8Result, K, N, assert_results_equal, by_equations, fp8_inputs, fp8_layer, run

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
SEED = -(2**50) + 3


def gradient_of(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Numbers of very different sizes, zeros among them."""
    made = torch.randn(rows, columns, device="cuda") * torch.randn(rows, columns, device="cuda").mul(2).exp()
    return torch.where(torch.rand(rows, columns, device="cuda") < 0.05, 0.0, made).to(dtype)


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(1, 32), (50, 96), (200, 352), (1000, 1024), (8192, 4096)], ids=str)
def test_it_writes_the_gradient_and_the_sample_of_the_specification(shape: tuple[int, int], dtype: torch.dtype) -> None:
    gradient, seed = gradient_of(*shape, dtype), torch.tensor(SEED, device="cuda")
    dy8, packed, bias, *scales = ops.sample_fp8(gradient, seed, True, torch.float32)
    if shape[0] <= 1000:
        expected = ops.sample_fp8(gradient.cpu(), torch.tensor(SEED), True, torch.float32)
        assert_bit_equal(dy8.view(torch.uint8).cpu(), expected[0].view(torch.uint8))
        assert_bit_equal(packed.cpu(), expected[1])
        assert_bit_equal(torch.stack(scales).cpu(), torch.stack(expected[3:]))
    else:
        drawn = mvue_fp8.sample(gradient, SEED)
        unpacked = ops.unpack_fp8(packed, shape[1], shape[0]).view(torch.uint8).mT
        assert_bit_equal(unpacked.contiguous(), drawn.codes)
        assert_bit_equal(dy8.view(torch.uint8), ops.quantise(gradient, True, False)[0].view(torch.uint8))
        assert_bit_equal(scales[1], drawn.scale)
    others = (gradient_of(*shape, dtype) for _ in range(20))
    samples = ((other.sum(0, dtype=torch.float32), other.double().sum(0)) for other in others)
    assert_as_good_as_torch(bias, gradient.sum(0, dtype=torch.float32), gradient.double().sum(0), samples=samples)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_what_is_not_finite_is_nan_as_on_the_cpu(bad: float) -> None:
    gradient = gradient_of(200, 96, BF16)
    gradient[77, 5] = bad
    found = ops.sample_fp8(gradient, None, True, None)
    expected = ops.sample_fp8(gradient.cpu(), None, True, None)
    assert found[3].isnan()
    assert found[4].isnan()
    assert_bit_equal(found[0].view(torch.uint8).cpu(), expected[0].view(torch.uint8))
    assert_bit_equal(found[1].cpu(), expected[1])


def pair(mask: str = "transposable", **config: Any) -> tuple[SemiSparseLinear, SemiSparseLinear]:
    """A layer on the CPU, and the same on the GPU."""
    layer = fp8_layer(mask, grad_output="mvue", **config)
    there = copy.deepcopy(layer).cuda()
    layer.held_seed, there.held_seed = torch.tensor(SEED), torch.tensor(SEED, device="cuda")
    return layer, there


def on_cpu(found: Fp8Result) -> Fp8Result:
    return Fp8Result(*(None if one is None else one.detach().cpu() for one in found))


@pytest.mark.parametrize("backend", ["cusparselt", "dense"])
@pytest.mark.parametrize("mask", ["transposable", "row"])
@pytest.mark.parametrize("leading", [(0,), (1,), (13,), (2, 16), (200,)], ids=str)
def test_a_layer_computes_the_equations(leading: tuple[int, ...], mask: str, backend: str) -> None:
    layer, there = pair(mask, backend=backend)
    x, dy = fp8_inputs(*leading)
    assert_results_equal(on_cpu(run(there, x.cuda(), dy.cuda())), by_equations(layer, x, dy))


@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
def test_fp32_parameters_under_autocast(dtype: torch.dtype) -> None:
    layer, there = pair(dtype=torch.float32, backend="cusparselt")
    x, dy = fp8_inputs(13, dtype=torch.float32, grad_dtype=dtype)
    x, dy = x / 1024, dy / 1024
    with torch.autocast("cuda", dtype):
        found = run(there, x.cuda(), dy.cuda())
    assert_results_equal(on_cpu(found), by_equations(layer, x, dy))


@pytest.fixture(params=["sampled", "whole"])
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    """Which way to dW the autotuner of this process knows for a layer of K x N with 13 or 200 tokens."""
    state = tuning.state()
    for tokens in (13, 200):
        gradient = WeightGradient(tokens, N, K, BF16, BF16, bias=True)
        choice = replace(SAMPLED, algorithm=0 if request.param == "sampled" else None)
        entry = {"key": autotuner().key(gradient, 0), "choice": choice.to_record()}
        tuning.load_state({"schema": 1, "choices": [entry]})
    yield request.param
    autotuner()._measured.clear()
    tuning.load_state(state)


@pytest.mark.parametrize("call", ["eager", "compiled", "recomputed"])
@pytest.mark.parametrize("mask", ["transposable", "row"])
def test_auto_follows_the_choice_in_every_kind_of_step(way: str, mask: str, call: str) -> None:
    """With the same compiled code for both ways, since an op chooses."""
    torch._dynamo.reset()
    layer, there = pair(mask)
    other = None if call == "eager" else CALLS[call](there)
    for tokens in (13, 200):
        x, dy = fp8_inputs(tokens)
        expected = by_equations(layer, x, dy)
        if way == "whole":
            expected = expected._replace(grad_weight=reference.fp8_grad_weight(dy, x, BF16))
        assert_results_equal(on_cpu(run(there, x.cuda(), dy.cuda(), other)), expected)
    (row,) = check(there, fp8_inputs(13)[0].cuda()).rows
    assert ("dense fp8 instead of a sampled dW (shared)" in row.backward) is (way == "whole")
    torch._dynamo.reset()


def test_auto_measures_both_ways_once_and_not_in_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = SemiSparseLinear(256, 512, config=SparseConfig(precision="fp8", grad_output="mvue")).cuda().to(BF16)
    tuner = Autotuner(engine(), None, shipped=tuple)
    for module in (dispatch, prepare):
        monkeypatch.setattr(module, "autotuner", lambda: tuner)
    native.forget_products()  # of an earlier test, which C++ would start without asking
    x = torch.randn(4096, 256, device="cuda", dtype=BF16)
    gradient = WeightGradient(4096, 512, 256, BF16, BF16, bias=True)
    run(layer, x, torch.randn(4096, 512, device="cuda", dtype=BF16))
    choice = tuner.known(gradient, 0)
    assert choice is not None and choice.source == "tuned" and choice.sparse_us and choice.dense_us and not choice.note
    graph = torch.cuda.CUDAGraph()
    x8t = ops.quantise(x, False, True)[1]
    new, scale = gradient_of(4096, 512, torch.float32), torch.ones((), device="cuda")
    with pytest.raises(EngineError, match="run one warm-up step"), torch.cuda.graph(graph):
        ops.fp8_sampled_grad_weight(new, x8t, scale, None, True, None, "auto", BF16)


def real_inputs(tokens: int) -> tuple[Tensor, Tensor]:
    return torch.randn(tokens, K, device="cuda", dtype=BF16), torch.randn(tokens, N, device="cuda", dtype=BF16)


CALLS: dict[str, Callable[[nn.Module], Callable[[Tensor], Tensor]]] = {
    "compiled": lambda net: torch.compile(net, fullgraph=True),
    "compiled into graphs": lambda net: torch.compile(net, fullgraph=True, mode="reduce-overhead"),
    "recomputed": lambda net: lambda x: checkpoint(net, x, use_reentrant=False),
}


@pytest.mark.parametrize("call", CALLS)
def test_steps_of_other_kinds_draw_what_eager_ones_do_and_follow_the_seed(call: str) -> None:
    torch._dynamo.reset()
    _, there = pair(backend="cusparselt")
    x, dy = real_inputs(200)
    other = CALLS[call](there)
    for seed in (SEED, 5, 6):
        there.held_seed.fill_(seed)
        found = Fp8Result(*(one.clone() for one in run(there, x, dy, other)))  # type: ignore[union-attr]
        assert_results_equal(found, run(there, x, dy))
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream does not match")  # eager, while the graph lives
def test_a_captured_step_reads_the_seed_the_input_and_the_weight_of_each_replay() -> None:
    _, there = pair()
    static, dy = real_inputs(64)
    static.requires_grad_()

    def step() -> Tensor:
        y = there(static)
        y.backward(dy)
        return y

    for _ in range(2):
        step()
    static.grad = None
    there.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step()
    gradients = static.grad, there.weight.grad, there.bias.grad
    with torch.no_grad():
        for factor in (2, -1):
            static.mul_(factor)
            there.weight.mul_(factor)
            there.held_seed.add_(factor)
            graph.replay()
            found = Fp8Result(*(one.detach().clone() for one in (y, *gradients)))
            with torch.enable_grad():
                assert_results_equal(found, run(there, static.detach(), dy))


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_nothing_synchronises() -> None:
    _, there = pair()
    x, dy = real_inputs(64)
    run(there, x, dy)
    try:
        torch.cuda.set_sync_debug_mode("error")
        run(there, x, dy)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_check_tells_what_ran() -> None:
    _, there = pair("row", backend="cusparselt")  # of its backward, dW alone is sparse
    (row,) = check(there, fp8_inputs(16)[0].cuda()).rows
    assert "cuSPARSELt algorithm" in row.backward
