"""Compiled fp8 layers: one graph, with the bits of eager layers."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition

from semisparse import Phase, SparseConfig, SparseSchedule, sparsify
from semisparse.testing import assert_bit_equal
from tests.nn.fp8 import K, assert_results_equal, fp8_inputs, fp8_layer, run

# Raised inside torch's own compiler.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("mask", ["transposable", "row", None])
def test_compiled_equals_eager_for_any_number_of_tokens(mask: str | None, backend: str) -> None:
    layer = fp8_layer(mask)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for leading in ((16,), (13,), (5,), (24,), (1,)):
        x, dy = fp8_inputs(*leading)
        assert_results_equal(run(layer, x, dy, compiled), run(layer, x, dy))
    assert counter.frame_count <= 3  # a first one, any number, one token


@pytest.mark.parametrize("dense_phase", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast_and_with_leading_sizes(dtype: torch.dtype, dense_phase: bool) -> None:
    layer, (x, dy) = fp8_layer(dtype=torch.float32), fp8_inputs(2, 7, dtype=torch.float32, grad_dtype=dtype)
    layer.sparse_enabled = not dense_phase
    x = x / 1024
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype):
        assert_results_equal(run(layer, x, dy, compiled), run(layer, x, dy))


class Shared(nn.Module):
    """Three layers that read one input."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(fp8_layer() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0](x) + self.layers[1](x) - self.layers[2](x)


def test_layers_that_read_the_same_input_round_it_once_with_inductors_partitioner() -> None:
    names: list[list[str]] = []

    def note(graph: torch.fx.GraphModule, inputs: object) -> Callable[..., object]:
        names.append([str(node.target) for node in graph.graph.nodes])
        return make_boxed_func(graph)

    model, (x, dy) = Shared(), fp8_inputs(16)
    backend = aot_autograd(fw_compiler=note, bw_compiler=note, partition_fn=min_cut_rematerialization_partition)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    compiled(x.clone().requires_grad_()).backward(dy)
    forward, backward = ([name for name in each if "quantise" in name] for each in names)
    assert len(forward) == 1
    assert len(backward) == 2  # dy and -dy


def test_each_phase_adds_at_most_one_compilation_and_the_calls_are_seen() -> None:
    model = nn.Sequential(nn.Linear(K, K), nn.ReLU(), nn.Linear(K, K))
    sparsify(model, {"0": SparseConfig(precision="fp8"), "2": SparseConfig(weight=None, precision="fp8")})
    schedule = SparseSchedule(model, [Phase(kind, 2) for kind in ("sparse", "dense", "sparse")])
    optimizer, counter = torch.optim.SGD(model.parameters(), lr=1e-3), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=False)
    x, compilations = torch.randn(8, K), []
    for _ in range(6):
        before = counter.frame_count
        y = compiled(x)
        assert_bit_equal(y, model(x))
        y.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert schedule.step()
        compilations.append(counter.frame_count - before)
    assert compilations == [1, 0, 1, 0, 0, 0]
