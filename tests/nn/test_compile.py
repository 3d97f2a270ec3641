"""torch.compile with fullgraph=True (so a graph break is an error) and the inductor CPU backend."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from semisparse import Phase, SparseSchedule, sparsify
from semisparse.testing import assert_bit_equal, small_integers
from tests.support import LAYER_CLASSES, make_layer, masked_dense

CLASSES = pytest.mark.parametrize("layer_class", LAYER_CLASSES, ids=lambda cls: cls.operand)
K, N = 16, 12

# Raised inside torch's own compiler.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def network(layer_class: type) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(K, 32), nn.ReLU(), nn.Linear(32, N))
    sparsify(model, layer_class.sparse_config)
    return model


def gradients(call, model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    x = x.detach().requires_grad_()
    output = call(x)
    output.square().sum().backward()
    return [output.detach(), x.grad, *(parameter.grad for parameter in model.parameters())]


@CLASSES
def test_forward_and_gradients_equal_eager(layer_class: type) -> None:
    # Whole numbers, so that fusing and reordering sums changes nothing.
    layer = make_layer(layer_class, small_integers((N, K), seed=1), small_integers((N,), seed=2))
    compiled = torch.compile(layer, fullgraph=True)
    x = small_integers((7, K), seed=3)
    for ours, eager in zip(gradients(compiled, layer, x), gradients(layer, layer, x), strict=True):
        assert_bit_equal(ours + 0, eager + 0)
    grad = 2 * layer(x).detach()
    expected = masked_dense(layer_class, x, layer.weight, layer.bias, grad)
    assert_bit_equal(gradients(compiled, layer, x)[1] + 0, expected.grad_input + 0)


@CLASSES
def test_twenty_token_counts_need_at_most_two_compilations(layer_class: type) -> None:
    model = network(layer_class)
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    counts = [5, 2, 3, 4, *range(6, 22)]
    assert len(set(counts)) == 20
    for tokens in counts:
        ours, eager = (gradients(call, model, torch.randn(tokens, K)) for call in (compiled, model))
        assert [part.shape for part in ours] == [part.shape for part in eager]
    assert counter.frame_count <= 2


@CLASSES
def test_a_compiled_step_sees_weights_that_changed(layer_class: type) -> None:
    layer = make_layer(layer_class, small_integers((N, K), seed=1, limit=9), None)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = small_integers((8, K), seed=3)
    for seed in range(4, 8):
        with torch.no_grad():
            layer.weight.copy_(small_integers((N, K), seed=seed, limit=9))
        expected = masked_dense(layer_class, x, layer.weight, None, torch.zeros(8, N)).output
        assert_bit_equal(compiled(x) + 0, expected + 0)


@CLASSES
@pytest.mark.parametrize("phases", [("dense", "sparse", "dense"), ("sparse", "dense", "sparse", "dense")])
def test_each_phase_adds_at_most_one_compilation(layer_class: type, phases: tuple[str, ...]) -> None:
    model = network(layer_class)
    schedule = SparseSchedule(model, [Phase(kind, 2) for kind in phases])
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=False)
    x = torch.randn(8, K)
    compilations = []
    for kind in phases:
        before = counter.frame_count
        for _ in range(2):
            assert schedule.phase == kind
            assert_bit_equal(compiled(x), model(x))
            schedule.step()
        compilations.append(counter.frame_count - before)
    assert compilations[0] == 1
    assert max(compilations) <= 1
    assert compilations[2:] == [0] * (len(phases) - 2)  # a kind seen before is not compiled again


@CLASSES
def test_under_autocast_with_fp32_parameters(layer_class: type) -> None:
    layer = make_layer(layer_class, small_integers((N, K), seed=1), small_integers((N,), seed=2))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = small_integers((7, K), seed=3)
    with torch.autocast("cpu", torch.bfloat16):
        output, eager = compiled(x), layer(x)
    assert output.dtype == torch.bfloat16
    assert_bit_equal(output + 0, eager + 0)
    output.sum().backward()
    assert layer.weight.grad.dtype == torch.float32


@CLASSES
def test_compiling_before_or_after_moving_to_eval_changes_nothing(layer_class: type) -> None:
    model = network(layer_class)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(8, K)
    assert_bit_equal(compiled(x), model(x))
    model.eval()
    with torch.no_grad():
        assert_bit_equal(compiled(x), model(x))
