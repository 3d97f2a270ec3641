"""Operands that are one tensor, views of one, or parts of one buffer: gradients of both places, eager and compiled."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semisparse import SemiSparseLinear, ops, routes
from semisparse.functional import semi_sparse_activation_linear, semi_sparse_linear

N = 16
CASES: dict[str, tuple[Callable[..., tuple[Tensor, ...]], int]] = {
    "same": (lambda b: (b.view(N, N), b.view(N, N)), N * N),
    "one view": (lambda b: (m := b.view(N, N), m), N * N),
    "transposed": (lambda b: (b.view(N, N).t(), b.view(N, N)), N * N),
    "slice": (lambda b: (b.view(N, N)[:8], b.view(N, N)), N * N),
    "a row": (lambda b: (b.view(N, N)[3], b.view(N, N)), N * N),
    "bias is a row": (lambda b: (m := b.view(N, N), m, m[1]), N * N),
    "input and bias": (lambda b: (b[: N * N].view(N, N)[0], b[N * N :].view(N, N), b[:N]), 2 * N * N),
    "one buffer": (lambda b: (b[: N * N].view(N, N), b[N * N : 2 * N * N].view(N, N), b[2 * N * N :]), 2 * N * N + N),
    "overlapping": (lambda b: (b[: N * N].view(N, N), b[N : N * N + N].view(N, N)), N * N + N),
}
FUNCTIONS = {"weight": semi_sparse_linear, "activation": semi_sparse_activation_linear}


@pytest.fixture(params=["packed", "masked dense"])
def route(request, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "packed":
        monkeypatch.setattr(routes, "packs", lambda weight, dtype, backend: dtype == torch.bfloat16)
    return request.param


def gradient(call: Callable[[Tensor], Tensor], buffer: Tensor) -> Tensor:
    leaf = buffer.clone().requires_grad_()
    y = call(leaf)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape))
    assert leaf.grad is not None
    return leaf.grad


def by_hand(operand: str, buffer: Tensor, parts: Callable[..., tuple[Tensor, ...]]) -> Tensor:
    """The sum of what each place contributes, from separate leaves."""
    views = parts(buffer)
    leaves = [view.detach().clone().requires_grad_() for view in views]
    y = FUNCTIONS[operand](*leaves)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape))
    leaf = buffer.clone().requires_grad_()
    pairs = zip(parts(leaf), leaves, strict=True)
    sum((view * other.grad).sum() for view, other in pairs).backward()
    return leaf.grad


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("operand", FUNCTIONS)
@pytest.mark.parametrize("how", ["eager", "compiled"])
def test_each_place_contributes_its_gradient(route: str, operand: str, case: str, how: str) -> None:
    parts, size = CASES[case]
    buffer = torch.randn(size, generator=torch.Generator().manual_seed(5)).to(torch.bfloat16)

    def call(b: Tensor) -> Tensor:
        return FUNCTIONS[operand](*parts(b))

    torch._dynamo.reset()
    used = call if how == "eager" else torch.compile(call, backend="aot_eager", fullgraph=True)
    ours, expected = gradient(used, buffer).float(), by_hand(operand, buffer, parts).float()
    # bf16 sums of two bf16 gradients: two roundings apart at most.
    assert (ours - expected).norm() <= 2 * torch.finfo(torch.bfloat16).eps * expected.norm()


@pytest.mark.parametrize("operand", FUNCTIONS)
def test_compiled_code_never_hands_one_tensor_over_twice(monkeypatch: pytest.MonkeyPatch, operand: str) -> None:
    """torch.compile of torch 2.11 loses a gradient there; newer ones do not, so the graph itself is looked at."""
    monkeypatch.setattr(routes, "packs", lambda weight, dtype, backend: dtype == torch.bfloat16)
    seen = []

    def backend(graph, inputs):
        seen.extend(graph.graph.nodes)
        return graph.forward

    x = torch.randn(N, N, dtype=torch.bfloat16, requires_grad=True)
    torch._dynamo.reset()
    torch.compile(lambda x: FUNCTIONS[operand](x, x), backend=backend, fullgraph=True)(x)
    applied = [node for node in seen if "autograd_function_apply" in str(node.target)]
    assert len(applied) == 1
    operands = [arg for arg in applied[0].args if isinstance(arg, torch.fx.Node)]
    assert len(operands) == len(set(operands))


@pytest.mark.parametrize("how", ["eager", "compiled"])
def test_two_layers_on_one_weight_add_their_gradients(route: str, how: str) -> None:
    first, second = (SemiSparseLinear(N, N, dtype=torch.bfloat16) for _ in range(2))
    second.weight = first.weight
    model, x = nn.Sequential(first, second), torch.randn(8, N, dtype=torch.bfloat16)
    torch._dynamo.reset()
    used = model if how == "eager" else torch.compile(model, backend="aot_eager", fullgraph=True)
    used(x).float().sum().backward()
    ours = first.weight.grad.float()
    pruned = ops.prune(first.weight.detach(), torch.bfloat16, "transposable")
    leaves = [pruned.clone().requires_grad_() for _ in range(2)]
    F.linear(F.linear(x, leaves[0], first.bias), leaves[1], second.bias).float().sum().backward()
    expected = (leaves[0].grad + leaves[1].grad).float()
    assert (ours - expected).norm() <= 4 * torch.finfo(torch.bfloat16).eps * expected.norm()
