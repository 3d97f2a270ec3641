"""Memory of the packed route, packing once for several micro-batches, and long runs without growth."""

import resource

import pytest
import torch

import semisparse
from semisparse.testing import assert_bit_equal
from tests.functional.counting import CountOps

# PyTorch starts each pool of graphs with an empty one, and warns of it.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")]


def layers(backend="cusparselt", count=8, size=1024):
    torch.manual_seed(0)
    net = torch.nn.Sequential(*(torch.nn.Linear(size, size) for _ in range(count))).to("cuda", torch.bfloat16)
    semisparse.sparsify(net, semisparse.SparseConfig(backend=backend))
    return net


def peak_of_step(net, x):
    def step():
        net.zero_grad(set_to_none=True)
        net(x).sum().backward()

    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def test_extra_peak_memory_is_at_most_one_packed_copy_of_the_weights_and_64_mib():
    net = layers(count=12, size=4096)
    x = torch.randn(256, 4096, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    sparse = peak_of_step(net, x)
    weight_bytes = sum(p.numel() * 2 for p in net.parameters() if p.dim() == 2)
    semisparse.densify(net)
    dense = peak_of_step(net, x)
    assert sparse - dense <= weight_bytes * 9 / 16 + (64 << 20)


def test_eight_micro_batches_pack_once():
    net = layers(count=2)
    x = torch.randn(64, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    with CountOps() as counter, semisparse.reuse_packed(net) as packed:
        for _ in range(8):
            net(x).sum().backward()
    assert packed == 2
    assert not counter.counts["pack"] and not counter.counts["pack_linear"]  # one launch for both, outside of the ops
    assert counter.counts["packed_matmul"] == 2 * 2 * 8


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_reuse_under_compile_sees_each_blocks_weights(mode):
    net = layers(count=2)
    compiled = torch.compile(net, fullgraph=True, mode=mode)
    x = torch.randn(64, 1024, device="cuda", dtype=torch.bfloat16)
    for _ in range(4):
        with semisparse.reuse_packed(net):
            for _ in range(3):
                net.zero_grad(set_to_none=True)
                y = compiled(x)
                y.float().square().mean().backward()
            found = y.detach().clone()
        assert_bit_equal(found, net(x).detach())
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    torch._dynamo.reset()


def test_three_thousand_steps_over_32_shapes_do_not_grow():
    net = layers(count=2, size=256)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-6)
    inputs = [torch.randn(16 + 24 * i, 256, device="cuda", dtype=torch.bfloat16) for i in range(32)]

    def steps(count):
        for turn in range(count):
            optimizer.zero_grad(set_to_none=True)
            net(inputs[turn % 32]).sum().backward()
            optimizer.step()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    steps(320)
    device_before, host_before = steps(32)
    device_after, host_after = steps(3000)
    assert device_after - device_before <= 256 << 10
    assert host_after - host_before <= 16 << 20
