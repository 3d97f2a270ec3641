"""Compiled layers give the bits of eager ones, results and gradients, in every dtype.

torch.compile of torch 2.11 gave the gradient of a result to another output where both were one tensor, as after a
conversion to the dtype that a tensor has; so fp8 in fp32 trained on wrong gradients, without a word.
"""

import pytest
import torch
from torch import Tensor, nn

from semisparse import SparseConfig, sparsify

CONFIGS = {
    "2:4": SparseConfig(),
    "2:4, row": SparseConfig(weight="row"),
    "2:4 + mvue": SparseConfig(grad_output="mvue"),
    "repack": SparseConfig(repack=True),
    "activation": SparseConfig(weight=None, activation="transposable"),
    "fp8": SparseConfig(weight=None, precision="fp8"),
    "fp8 + 2:4": SparseConfig(precision="fp8"),
    "fp8 + 2:4, row": SparseConfig(weight="row", precision="fp8"),
    "fp8 + 2:4 + mvue": SparseConfig(precision="fp8", grad_output="mvue"),
}


def results(config: SparseConfig, dtype: torch.dtype, bias: bool, compiled: bool) -> list[Tensor]:
    """y, dx, dW and db of one layer."""
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(32, 64, bias=bias, dtype=dtype))
    sparsify(layer, config)
    if config.grad_output is not None:
        layer[0].held_seed = torch.tensor(1)
    x = torch.randn(8, 32, dtype=dtype, requires_grad=True)
    call = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
    y = call(x)
    y.float().square().mean().backward()
    return [y.detach(), x.grad, *(parameter.grad for parameter in layer.parameters())]


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_compiled_layer_has_the_gradients_of_an_eager_one(name: str, dtype: torch.dtype, bias: bool) -> None:
    torch.compiler.reset()
    eager, compiled = (results(CONFIGS[name], dtype, bias, how) for how in (False, True))
    assert all(torch.equal(one, other) for one, other in zip(eager, compiled, strict=True))
