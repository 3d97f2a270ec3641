"""pack="per_step" on a GPU: the training of packing at each forward, eager, compiled and from CUDA graphs."""

import copy
import threading

import pytest
import torch
from torch import Tensor, nn

import semisparse
from semisparse import PackedWeights, Phase, SparseSchedule
from semisparse.testing import assert_bit_equal

# PyTorch starts each pool of graphs with an empty one, and warns of it.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")]
BF16 = torch.bfloat16
SIZE, TOKENS = 256, 128
EACH_PRECISION = pytest.mark.parametrize("precision", [None, "fp8"])


def network(layers: int = 3, dtype: torch.dtype = BF16, precision: str | None = None) -> nn.Sequential:
    if precision == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("fp8 needs capability 8.9")
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(SIZE, SIZE) for _ in range(layers))).to("cuda", dtype)
    semisparse.sparsify(net, semisparse.SparseConfig(precision=precision, backend="cusparselt"))
    return net


def x_of(step: int, dtype: torch.dtype = BF16) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(step)
    return torch.randn(TOKENS, SIZE, generator=generator, device="cuda").to(dtype)


def trained(
    pack: str, call_of, *, dtype: torch.dtype = BF16, fused: bool = True, precision: str | None = None
) -> Tensor:
    """The losses of some steps."""
    net = network(dtype=dtype, precision=precision)
    schedule = SparseSchedule(net, [Phase("sparse", 8)], pack=pack)
    schedule.trust_calls()
    with torch.autocast("cuda", BF16, enabled=dtype is torch.float32):
        net(x_of(0, dtype)).sum().backward()  # tunes the products; per step, learns the dtype
        schedule.refresh()
    call = call_of(net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, fused=fused)
    losses = []
    for step in range(6):
        optimizer.zero_grad()
        with torch.autocast("cuda", BF16, enabled=dtype is torch.float32):
            loss = call(x_of(step, dtype)).float().square().mean()
        loss.backward()
        losses.append(loss.detach().clone())
        optimizer.step()
        schedule.step()
    assert schedule.packed_weights is None or schedule.packed_weights.layers == 3
    assert schedule.packed_weights is None or not schedule.packed_weights.fallbacks
    return torch.stack(losses)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@EACH_PRECISION
def test_eager_training_is_that_of_packing_at_each_forward(
    precision: str | None, dtype: torch.dtype, fused: bool
) -> None:
    ours, expected = (
        trained(pack, lambda net: net, dtype=dtype, fused=fused, precision=precision)
        for pack in ("per_step", "each_forward")
    )
    assert_bit_equal(ours, expected)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@EACH_PRECISION
def test_compiled_steps_read_what_was_packed_last(precision: str | None, mode: str) -> None:
    def compiled(net: nn.Module):
        return torch.compile(net, fullgraph=True, mode=mode)

    ours, expected = (trained(pack, compiled, precision=precision) for pack in ("per_step", "each_forward"))
    assert_bit_equal(ours, expected)
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream does not match")
@EACH_PRECISION
def test_graphed_callables_read_what_was_packed_last(precision: str | None) -> None:
    def graphed(net: nn.Module):
        return torch.cuda.make_graphed_callables(net, (x_of(0),))

    expected = trained("each_forward", lambda net: net, precision=precision)
    assert_bit_equal(trained("per_step", graphed, precision=precision), expected)


@EACH_PRECISION
def test_a_captured_step_reads_the_buffers_and_packs_nothing(precision: str | None) -> None:
    net = network(precision=precision)
    weights = PackedWeights(net)
    weights.pack()
    x = x_of(0)
    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            net(x)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = net(x)
        for step in range(4):
            for parameter in net.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
            graph.replay()
            stale = y.clone()
            weights.pack()
            graph.replay()
            assert_bit_equal(y, copy.deepcopy(net)(x))
            assert not torch.equal(stale, y), step


@EACH_PRECISION
def test_a_captured_pack_follows_weights_that_the_graph_writes(precision: str | None) -> None:
    net = network(precision=precision)
    weights = PackedWeights(net)
    weights.pack()
    x = x_of(0)
    with torch.no_grad():
        weights.pack()
        net(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for parameter in net.parameters():
                parameter.mul_(0.5)
            weights.pack()
        assert_bit_equal(net(x), copy.deepcopy(net)(x))  # nothing of the capture ran
        for _ in range(3):
            graph.replay()
            assert_bit_equal(net(x), copy.deepcopy(net)(x))


@EACH_PRECISION
def test_a_change_seen_on_two_streams_at_once(precision: str | None) -> None:
    net = network(layers=8, precision=precision)
    weights = PackedWeights(net)
    weights.pack()
    x = x_of(0)
    for _ in range(20):
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
            expected = copy.deepcopy(net)(x)
        torch.cuda.synchronize()
        found: list[Tensor] = []

        def work(found: list[Tensor] = found) -> None:
            with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
                found.append(net(x))
                torch.cuda.current_stream().synchronize()

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for y in found:
            assert_bit_equal(y, expected)
        assert len(found) == 4


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@EACH_PRECISION
def test_packing_synchronises_nothing(precision: str | None) -> None:
    net = network(precision=precision)
    weights = PackedWeights(net)
    weights.pack()
    net(x_of(0))
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        weights.pack()
        net(x_of(0))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_dense_layers_hold_no_memory() -> None:
    net = network(layers=8)
    schedule = SparseSchedule(net, [Phase("sparse", 1), Phase("dense", 1)], pack="per_step")
    before = torch.cuda.memory_allocated()
    schedule.trust_calls()
    held = torch.cuda.memory_allocated() - before
    assert held >= 8 * SIZE * SIZE * 2 * 9 // 8
    with torch.no_grad():
        net[0].weight.neg_()
    schedule.resume_at(1)
    assert torch.cuda.memory_allocated() - before < held // 100  # the small table of their launch is kept
