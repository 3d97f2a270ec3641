"""Exporters: what would lose gradients or does not know the ops is a typed error that names the way out."""

import pytest
import torch
from torch import nn

import semisparse
from semisparse import SemiSparseActivationLinear, densify, routes, sparsify
from semisparse.errors import ExportError
from semisparse.functional import semi_sparse_activation_linear, semi_sparse_linear
from semisparse.testing import assert_bit_equal, small_integers
from tests.support import config_of

X = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))
OPERANDS = pytest.mark.parametrize("operand", ["weight", "activation"])


def net(operand: str = "weight", mask: str = "transposable") -> nn.Sequential:
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
    sparsify(model, config_of(operand, mask))
    return model


@pytest.fixture(params=["masked dense", "packed"])
def route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both routes run on the CPU: the packed ops have a CPU implementation, only the choice is forced."""
    if request.param == "packed":
        monkeypatch.setattr(routes, "packs", lambda weight, dtype, backend: True)
    return request.param


def gradients(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Output and gradients of one step: of the input, then of the parameters."""
    leaf = x.clone().requires_grad_()
    y = model(leaf)
    y.square().sum().backward()
    return [y.detach(), leaf.grad, *(parameter.grad for parameter in model.parameters())]


@OPERANDS
@pytest.mark.parametrize("mask", ["transposable", "row"])
@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_model_trains(route: str, operand: str, mask: str, strict: bool) -> None:
    if operand == "activation" and mask == "row":
        return
    model, other = (net(operand, mask).to(torch.bfloat16) for _ in range(2))
    for layer, seed in ((0, 1), (2, 2)):  # whole numbers: on the packed route the exported graph adds a bias later
        for parameters in (model[layer].parameters(), other[layer].parameters()):
            for parameter in parameters:
                parameter.data = small_integers(parameter.shape, seed=seed, limit=2, dtype=torch.bfloat16)
    x = small_integers((4, 16), seed=5, limit=2, dtype=torch.bfloat16)
    program = torch.export.export(model, (x.clone().requires_grad_(),), strict=strict)
    assert any(("packed" if route == "packed" else "prune") in str(node.target) for node in program.graph.nodes)
    for ours, expected in zip(gradients(program.module(), x), gradients(other, x), strict=True):
        assert_bit_equal(ours, expected)


@OPERANDS
def test_the_functions_export_in_training_from_a_module_of_ones_own(route: str, operand: str) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(small_integers((32, 16), seed=1, dtype=torch.bfloat16))
            self.bias = nn.Parameter(small_integers((32,), seed=2, dtype=torch.bfloat16))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            call = {"weight": semi_sparse_linear, "activation": semi_sparse_activation_linear}[operand]
            return call(x, self.weight, self.bias)

    own, x = Own(), small_integers((4, 16), seed=5, dtype=torch.bfloat16)
    module = torch.export.export(own, (x,)).module()
    for ours, other in zip(gradients(module, x), gradients(Own(), x), strict=True):
        assert_bit_equal(ours, other)


def test_a_second_derivative_of_an_exported_packed_product_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "packs", lambda weight, dtype, backend: True)
    x = X.bfloat16().requires_grad_()
    module = torch.export.export(net().to(torch.bfloat16), (x,)).module()
    (first,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@OPERANDS
@pytest.mark.parametrize("strict", [False, True])
def test_export_for_inference_computes_the_same(operand: str, strict: bool) -> None:
    model = net(operand).eval()
    program = torch.export.export(model, (X,), strict=strict)
    assert_bit_equal(program.module()(X), model(X))


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # torch 2.11's own loader
def test_an_exported_program_is_saved_and_loaded(tmp_path) -> None:
    model = net().eval()
    torch.export.save(torch.export.export(model, (X,)), tmp_path / "model.pt2")
    assert_bit_equal(torch.export.load(tmp_path / "model.pt2").module()(X), model(X))


def test_export_in_a_dense_phase_trains() -> None:
    model = net()
    for layer in (model[0], model[2]):
        layer.sparse_enabled = False
    module = torch.export.export(model, (X,)).module()
    module(X).sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_export_of_frozen_layers_in_training_works() -> None:
    model = net().requires_grad_(False)
    assert_bit_equal(torch.export.export(model, (X,)).module()(X), model(X))


@OPERANDS
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.*:DeprecationWarning")
def test_a_trace_is_saved_loaded_and_trained(route: str, operand: str, tmp_path) -> None:
    model, x = net(operand).bfloat16(), small_integers((4, 16), seed=5, dtype=torch.bfloat16)
    torch.jit.save(torch.jit.trace(model, x), tmp_path / "traced.pt")
    loaded = torch.jit.load(tmp_path / "traced.pt")
    for ours, expected in zip(gradients(loaded, x), gradients(model, x), strict=True):
        assert_bit_equal(ours, expected)


@OPERANDS
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # of sizes that become constants, as in any trace
def test_jit_script_is_refused_and_trace_works(operand: str) -> None:
    model = net(operand)
    with pytest.raises(ExportError, match=r"torch\.jit\.script cannot compile.*semisparse\.densify"):
        torch.jit.script(model)
    traced = torch.jit.trace(model.eval(), X)
    assert_bit_equal(traced(X), model(X))
    densify(model)
    torch.jit.script(model)


@OPERANDS
def test_fx_records_a_call_of_the_layer(operand: str) -> None:
    model = net(operand)
    traced = torch.fx.symbolic_trace(model)
    assert [node.op for node in traced.graph.nodes] == ["placeholder", *3 * ["call_module"], "output"]
    traced(X).sum().backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model(X).sum().backward()
    for ours, expected in zip(gradients, model.parameters(), strict=True):
        assert_bit_equal(ours, expected.grad)


def test_a_tracer_without_modules_is_told() -> None:
    graph = torch.fx.Graph()
    proxy = torch.fx.Proxy(graph.placeholder("x"), torch.fx.proxy.GraphAppendingTracer(graph))
    with pytest.raises(ExportError, match="densify first"):
        SemiSparseActivationLinear(16, 16)(proxy)


def test_onnx_is_told_to_densify(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    with pytest.raises(ExportError, match=r"ONNX has no operator.*weights='masked'"):
        torch.export.export(net().eval(), (X,))


def test_the_strict_capture_of_the_onnx_exporter_is_told_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    with pytest.raises(RuntimeError, match=r"ONNX has no operator.*weights='masked'"):
        torch.export.export(net().eval(), (X,), strict=True)


def test_gradients_pass_an_exported_layer_that_does_not_train() -> None:
    model = nn.Sequential(nn.Linear(16, 16), SemiSparseActivationLinear(16, 16), nn.Linear(16, 16))
    model[1].requires_grad_(False)
    module = torch.export.export(model, (X,)).module()
    module(X).sum().backward()
    model(X).sum().backward()
    for ours, expected in zip(module.parameters(), model.parameters(), strict=True):
        assert (ours.grad is None) is (expected.grad is None)
        assert ours.grad is None or torch.equal(ours.grad, expected.grad)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("how", ["export", "trace"])
def test_what_is_recorded_inside_reuse_packed_follows_its_own_weight(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    monkeypatch.setattr(routes, "packs", lambda weight, dtype, backend: True)
    model, x = net().bfloat16(), X.bfloat16()
    with semisparse.reuse_packed(model):
        recorded = torch.export.export(model, (x,)).module() if how == "export" else torch.jit.trace(model, x)
    with torch.no_grad():
        for parameter in recorded.parameters():
            parameter.zero_()
    assert not recorded(x).any()


def test_fx_and_hooks_of_the_layer() -> None:
    model = net()
    model[0].register_forward_hook(lambda module, args, output: output * 2)
    with pytest.raises(ExportError, match="0 has forward hooks"):
        torch.fx.symbolic_trace(model)


def test_fx_of_a_single_layer_names_the_way_out() -> None:
    with pytest.raises(ExportError, match=r"it is the root.*trace a module that holds the layer"):
        torch.fx.symbolic_trace(SemiSparseActivationLinear(16, 16))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_the_older_onnx_exporter_is_told_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    with pytest.raises(ExportError, match="ONNX has no operator"):
        torch.jit.trace(net().eval(), X)
