"""torch.compile, CUDA graphs, threads and streams on the packed route."""

import threading

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import semisparse
from semisparse.testing import assert_bit_equal, small_integers
from tests.support import config_of

# PyTorch starts each pool of graphs with an empty one, and warns of it.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")]


def model(backend="cusparselt", operand="weight"):
    """Two linears with small-integer weights: with integer inputs every product and sum is exact, in any order."""
    net = torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.ReLU(), torch.nn.Linear(512, 256))
    net = net.to("cuda", torch.bfloat16)
    with torch.no_grad():
        for seed, parameter in enumerate(net.parameters()):
            parameter.copy_(small_integers(parameter.shape, seed=seed, dtype=torch.bfloat16, device="cuda"))
    semisparse.sparsify(net, config_of(operand, backend=backend))
    return net


def inputs(tokens):
    return [small_integers((tokens, 256), seed=seed, dtype=torch.bfloat16, device="cuda") for seed in (10, 11)]


def result_and_grads(net, call, x, grad):
    net.zero_grad(set_to_none=True)
    y = call(x)
    y.backward(grad)
    return [y.detach(), *(p.grad for p in net.parameters())]


@pytest.mark.parametrize("operand", ["weight", "activation"])
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_without_graph_breaks_gives_the_eager_result(mode, operand):
    net = model(operand=operand)
    x, grad = inputs(200)
    expected = result_and_grads(net, net, x, grad)
    compiled = torch.compile(net, fullgraph=True, mode=mode)
    for _ in range(4):  # warm-up, recording and replays of reduce-overhead
        found = [t.clone() for t in result_and_grads(net, compiled, x, grad)]
    for ours, eager in zip(found, expected, strict=True):
        assert_bit_equal(ours, eager)
    torch._dynamo.reset()


def test_twenty_token_counts_compile_at_most_twice():
    net = model()
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(net, fullgraph=True, backend=counter)
    for tokens in range(2, 42, 2):
        compiled(torch.randn(tokens, 256, device="cuda", dtype=torch.bfloat16)).sum().backward()
    assert counter.frame_count <= 2
    torch._dynamo.reset()


def test_a_schedule_adds_at_most_one_compilation_a_phase():
    net = model()
    schedule = semisparse.SparseSchedule.dense_sparse_dense(net, 6, 1 / 3, 1 / 3)
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(net, fullgraph=True, backend=counter)
    x = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16)
    for _ in range(6):
        compiled(x).sum().backward()
        schedule.step()
    assert counter.frame_count <= 3
    torch._dynamo.reset()


def test_a_whole_step_replays_from_a_cuda_graph():
    nets = [model() for _ in range(2)]
    optimizers = [torch.optim.AdamW(n.parameters(), lr=1e-3, capturable=True, fused=True) for n in nets]
    x = torch.randn(208, 256, device="cuda", dtype=torch.bfloat16)

    def step(net, optimizer):
        optimizer.zero_grad(set_to_none=True)
        loss = net(x).float().square().mean()
        loss.backward()
        optimizer.step()
        return loss

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for net, optimizer in zip(nets, optimizers, strict=True):
            for _ in range(3):
                step(net, optimizer)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(nets[0], optimizers[0])
    for _ in range(20):
        x.normal_()
        graph.replay()
        eager = step(nets[1], optimizers[1])
        assert_bit_equal(captured, eager.detach())
    for ours, expected in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert_bit_equal(ours.detach(), expected.detach())


def test_backward_on_another_thread_and_forwards_on_eight():
    net = model()
    x, grad = inputs(128)
    expected = [t.clone() for t in result_and_grads(net, net, x, grad)]
    net.zero_grad(set_to_none=True)
    thread = threading.Thread(target=net(x).backward, args=(grad,))
    thread.start()
    thread.join()
    for parameter, grad in zip(net.parameters(), expected[1:], strict=True):
        assert_bit_equal(parameter.grad, grad)
    y, wrong = net(x).detach(), []

    def work():
        with torch.no_grad():
            wrong.extend(1 for _ in range(50) if not torch.equal(net(x), y))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_two_streams_with_allocator_churn_stay_bit_equal():
    net = model()
    x = torch.randn(512, 256, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        expected = net(x)
        torch.cuda.synchronize()
        streams = [torch.cuda.Stream() for _ in range(2)]
        results = []
        for turn in range(250):
            with torch.cuda.stream(streams[turn % 2]):
                torch.empty(1 << (10 + turn % 12), device="cuda").normal_()
                results.append(net(x))
        torch.cuda.synchronize()
    assert all(torch.equal(result, expected) for result in results)
