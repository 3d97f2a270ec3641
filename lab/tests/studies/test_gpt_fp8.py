"""torchao's row computes with the weights that ours prunes, in its own fp8."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from semisparse import SemiSparseLinear, densify, sparsify
from semisparse.errors import ConfigError
from semisparse_lab.studies import gpt_fp8
from semisparse_lab.train import float8


def test_rows_differ_in_nothing_but_how_products_are_computed() -> None:
    torchao, fp8, bf16, _ = (row.recipe for row in gpt_fp8.rows("auto"))
    assert (fp8.config.precision, bf16.config.precision) == ("fp8", None)
    assert bf16 == replace(fp8, config=replace(fp8.config, precision=None))
    assert torchao == replace(bf16, config=replace(bf16.config, backend="dense"))


def test_a_missing_torchao_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(f"no {name}")

    monkeypatch.setattr(float8.importlib, "import_module", missing)
    with pytest.raises(ConfigError, match="pip install torchao"), float8.masked_float8(nn.Linear(4, 4)):
        pass


@pytest.mark.parametrize("sparse", [True, False])
def test_torchao_multiplies_the_pruned_weight_and_its_gradient_passes_straight_through(sparse: bool) -> None:
    pytest.importorskip("torchao.float8")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96))
    sparsify(model, select="*")
    layer = model[0]
    layer.sparse_enabled = sparse
    x, dy = torch.randn(32, 64).bfloat16().requires_grad_(), torch.randn(32, 96).bfloat16()
    with float8.masked_float8(model), torch.autocast("cpu", torch.bfloat16):
        y = model(x)
        y.backward(dy)
    weight = layer.pruned_weight() if sparse else layer.weight.detach()

    def close(found: torch.Tensor, exact: torch.Tensor) -> bool:  # e4m3 and e5m2 keep three bits and two
        return float((found.detach().double() - exact).norm() / exact.norm()) < 2**-3

    assert y.dtype is torch.bfloat16
    assert close(y, x.detach().double() @ weight.double().T + layer.bias.detach().double())
    assert close(x.grad, dy.double() @ weight.double())
    assert close(layer.weight.grad, dy.double().T @ x.detach().double())
    assert type(layer) is SemiSparseLinear and not hasattr(layer, "torchao")
    densify(model)
    assert type(model[0]) is nn.Linear
