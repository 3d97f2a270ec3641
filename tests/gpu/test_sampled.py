"""grad_output="mvue" on a GPU: the specification's sample, in eager, compiled, captured and checkpointed steps."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from semisparse import Phase, SemiSparseLinear, SparseConfig, SparseSchedule, ops, sparsify
from semisparse.reference import mvue
from semisparse.testing import assert_as_good_as_torch, assert_bit_equal, small_integers

# PyTorch starts each pool of graphs with an empty one, and warns of it. The second: a cuBLAS product as the first CUDA
# call of its autograd thread.
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:The CUDA Graph is empty"),
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS, but there was no current"),
]

BF16, FP16 = torch.bfloat16, torch.float16
K, N = 256, 512
SPECIAL = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1.0, -1.0]


def gradient_of(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Numbers of very different sizes, and some that are not numbers."""
    made = torch.randn(rows, columns, device="cuda") * torch.randn(rows, columns, device="cuda").mul(6).exp2()
    special = torch.tensor(SPECIAL, device="cuda")[torch.randint(len(SPECIAL), (rows, columns), device="cuda")]
    return torch.where(torch.rand(rows, columns, device="cuda") < 0.02, special, made).to(dtype)


def without_payloads(tensor: Tensor) -> Tensor:
    return torch.where(tensor.isnan(), 7.0, tensor)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("shape", [(1, 16), (50, 48), (200, 336), (1000, 1008), (8192, 4096)], ids=str)
def test_the_packed_sample_is_the_specifications_on_either_device(shape: tuple[int, int], dtype: torch.dtype) -> None:
    gradient, seed = gradient_of(*shape, dtype), torch.tensor(-(2**50) + 3, device="cuda")
    rows = -(-shape[0] // 16) * 16
    packed, bias = ops.pack_sample(gradient, seed, True)
    drawn = ops.unpack(packed, shape[1], rows, dtype)[:, : shape[0]].mT
    expected = ops.sample(gradient, seed)
    assert_bit_equal(without_payloads(drawn) + 0.0, without_payloads(expected) + 0.0)
    if shape[0] <= 1000:
        on_the_cpu = mvue.sample(gradient.cpu(), int(seed)).matrix
        assert_bit_equal(without_payloads(expected.cpu()) + 0.0, without_payloads(on_the_cpu) + 0.0)
    finite = gradient.isfinite().all(0)
    exact = gradient.double().sum(0)
    assert_as_good_as_torch(bias[finite], gradient.sum(0)[finite], exact[finite])


def model(layers: int = 2, backend: str = "cusparselt") -> nn.Sequential:
    """Small whole numbers: every product and sum is exact, in any order."""
    net = nn.Sequential(*(nn.Linear(*((K, N) if place % 2 == 0 else (N, K))) for place in range(layers)))
    net = net.to("cuda", BF16)
    with torch.no_grad():
        for seed, parameter in enumerate(net.parameters()):
            parameter.copy_(small_integers(parameter.shape, seed=seed, limit=2, dtype=BF16, device="cuda"))
    sparsify(net, SparseConfig(grad_output="mvue", backend=backend))  # type: ignore[arg-type]
    return net


def results(net: nn.Module, call: Callable[..., Any], x: Tensor, gradient: Tensor) -> list[Tensor]:
    net.zero_grad(set_to_none=True)
    leaf = x.clone().requires_grad_()
    y = call(leaf)
    y.backward(gradient)
    return [y.detach(), leaf.grad, *(p.grad for p in net.parameters())]


def inputs(tokens: int, features: int = K) -> tuple[Tensor, Tensor]:
    where: dict[str, Any] = {"limit": 2, "dtype": BF16, "device": "cuda"}
    return small_integers((tokens, K), seed=10, **where), small_integers((tokens, features), seed=11, **where)


@pytest.mark.parametrize("backend", ["cusparselt", "dense", "auto"])
@pytest.mark.parametrize("tokens", [1, 13, 200])
def test_a_layer_computes_the_equations(tokens: int, backend: str) -> None:
    net = model(1, backend)
    net[0].held_seed = torch.tensor(5, device="cuda")
    x, gradient = inputs(tokens, N)
    _, grad_x, grad_weight, grad_bias = results(net, net, x, gradient)
    drawn = mvue.sample(gradient.cpu(), 5).matrix.cuda()
    assert_bit_equal(grad_weight + 0.0, (drawn.double().mT @ x.double()).to(BF16) + 0.0)
    assert_bit_equal(grad_x + 0.0, (gradient.double() @ net[0].pruned_weight().double()).to(BF16) + 0.0)
    assert_bit_equal(grad_bias + 0.0, gradient.double().sum(0).to(BF16) + 0.0)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_steps_draw_what_eager_ones_do_and_follow_the_schedule(mode: str) -> None:
    net = model()
    schedule = SparseSchedule(net, [Phase("sparse", 10)], seed=3)
    schedule.trust_calls()
    x, gradient = inputs(200)
    compiled = torch.compile(net, fullgraph=True, mode=mode)
    for _ in range(4):
        found = [one.clone() for one in results(net, compiled, x, gradient)]
        for ours, eager in zip(found, results(net, net, x, gradient), strict=True):
            assert_bit_equal(ours + 0.0, eager + 0.0)
        before = [layer.held_seed.clone() for layer in net]
        schedule._advance()
        assert all(not torch.equal(layer.held_seed, seed) for layer, seed in zip(net, before, strict=True))
    torch._dynamo.reset()


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_step_repeats_its_sample(reentrant: bool) -> None:
    net = model()
    x, gradient = inputs(200)
    again = results(net, lambda x: checkpoint(net, x, use_reentrant=reentrant), x, gradient)
    for ours, expected in zip(again, results(net, net, x, gradient), strict=True):
        assert_bit_equal(ours, expected)


def test_a_replayed_step_reads_the_seed_as_it_is_then() -> None:
    nets = [model(), model()]
    schedules = [SparseSchedule(net, [Phase("sparse", 40)], seed=3) for net in nets]
    optimizers = [torch.optim.AdamW(net.parameters(), lr=1e-3, capturable=True, fused=True) for net in nets]
    x = torch.randn(208, K, device="cuda", dtype=BF16)

    def step(net: nn.Module, optimizer: torch.optim.Optimizer) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = net(x).float().square().mean()
        loss.backward()
        optimizer.step()
        return loss

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for net, optimizer, schedule in zip(nets, optimizers, schedules, strict=True):
            for _ in range(3):
                step(net, optimizer)
                schedule.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(nets[0], optimizers[0])
    for _ in range(10):
        x.normal_()
        graph.replay()
        assert_bit_equal(captured, step(nets[1], optimizers[1]).detach())
        schedules[0].resume_at(schedules[0].applied_steps + 1)  # step() doesn't see an optimizer step that is replayed
        schedules[1].step()
    for ours, expected in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert_bit_equal(ours.detach(), expected.detach())
    assert_bit_equal(nets[0][0].held_seed, nets[1][0].held_seed)


def test_an_overflow_makes_the_scaler_skip() -> None:
    layer = SemiSparseLinear(K, N, device="cuda", config=SparseConfig(grad_output="mvue", backend="cusparselt"))
    optimizer, scaler = torch.optim.SGD(layer.parameters(), 0.1), torch.amp.GradScaler("cuda")
    before = layer.weight.detach().clone()
    with torch.autocast("cuda", FP16):
        loss = layer(torch.randn(64, K, device="cuda")).float().sum() * float("inf")
    scaler.scale(loss).backward()
    assert not layer.weight.grad.isfinite().any()
    scaler.step(optimizer)
    scaler.update()
    assert_bit_equal(layer.weight.detach(), before)
