"""Exporters: what would lose gradients or does not know the ops is a typed error that names the way out."""

import pytest
import torch
from torch import nn

from semisparse import SemiSparseActivationLinear, SparseConfig, densify, sparsify
from semisparse.errors import ExportError
from semisparse.testing import assert_bit_equal

X = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))
OPERANDS = pytest.mark.parametrize("operand", ["weight", "activation"])


def net(operand: str = "weight") -> nn.Sequential:
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
    sparsify(model, SparseConfig(operand=operand))
    return model


@OPERANDS
@pytest.mark.parametrize("strict", [False, True])
def test_export_of_a_model_in_training_is_refused(operand: str, strict: bool) -> None:
    with pytest.raises(Exception, match=r"torch\.export of a sparse layer in training") as caught:
        torch.export.export(net(operand), (X,), strict=strict)
    if not strict:  # in strict mode dynamo wraps what traced code raises
        assert isinstance(caught.value, ExportError)


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


def test_what_an_activation_layer_would_cut_off_is_refused_too() -> None:
    """A frozen layer that prunes its input has no gradient formula in the graph; layers before it would get none."""
    model = nn.Sequential(nn.Linear(16, 16), SemiSparseActivationLinear(16, 16), nn.Linear(16, 16))
    model[1].requires_grad_(False)
    with pytest.raises(ExportError, match="would lose gradients"):
        torch.export.export(model, (X,))


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
