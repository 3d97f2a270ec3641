"""A model that was sparse leaves as a plain one, in each of the ways that docs/handing_over.md shows."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.sparse import _semi_structured_conversions as conversions

from semisparse import check_checkpoint, densify, sparsify

X = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))


def plain() -> nn.Sequential:
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))


@pytest.fixture
def masked() -> nn.Sequential:
    """A model that was sparse, with its pruned weights."""
    model = plain()
    sparsify(model)
    densify(model, weights="masked")
    return model


def test_a_file_of_it_is_2_4_and_loads_into_a_plain_model(masked: nn.Sequential, tmp_path: Path) -> None:
    save_file(masked.state_dict(), tmp_path / "model.safetensors")
    assert {weight.axis for weight in check_checkpoint(tmp_path / "model.safetensors")} == {"both"}
    model = plain()
    model.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(model(X), masked(X))


def test_an_exported_graph_knows_nothing_of_semisparse(masked: nn.Sequential) -> None:
    program = torch.export.export(masked, (X,))
    assert "semisparse" not in str(program.graph)
    assert torch.equal(program.module()(X), masked(X))


@pytest.mark.filterwarnings("ignore")  # the exporter's own
def test_an_onnx_model_of_it_computes_the_same_with_half_of_the_weights_zero(
    masked: nn.Sequential, tmp_path: Path
) -> None:
    onnx = pytest.importorskip("onnx", reason="pip install onnx onnxscript")
    pytest.importorskip("onnxscript", reason="pip install onnx onnxscript")
    from onnx.reference import ReferenceEvaluator

    program = torch.onnx.export(masked, (X,), dynamo=True, verbose=False)
    assert program is not None
    model = program.model_proto
    matrices = [onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer if len(tensor.dims) == 2]
    assert [(matrix == 0).mean() for matrix in matrices] == [0.5, 0.5]
    (output,) = ReferenceEvaluator(model).run(None, {model.graph.input[0].name: X.numpy()})
    torch.testing.assert_close(torch.from_numpy(output), masked(X))


def test_pytorchs_own_compression_takes_its_weights_without_loss(masked: nn.Sequential) -> None:
    weight = masked[0].weight.detach().half()
    values, metadata = conversions.sparse_semi_structured_from_dense_cutlass(weight)
    assert values.numel() == weight.numel() // 2
    assert torch.equal(conversions.sparse_semi_structured_to_dense_cutlass(values, metadata), weight)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor:UserWarning")
def test_pytorchs_own_sparse_product_is_the_dense_one() -> None:
    layer = nn.Linear(128, 256, device="cuda", dtype=torch.float16)
    sparsify(layer)
    densify(layer, weights="masked")
    x = torch.randint(-2, 3, (64, 128), device="cuda").half()
    with torch.no_grad():
        layer.weight.copy_(layer.weight.sign())  # whole numbers, so that the order of sums does not matter
        layer.bias.zero_()
    dense = layer(x)
    layer.weight = nn.Parameter(torch.sparse.to_sparse_semi_structured(layer.weight.detach()), requires_grad=False)
    with torch.inference_mode():
        assert torch.equal(layer(x), dense)
