"""What rounding to fp8 leaves of a layer's results: signal to noise against fp64, beside torchao's float8.

Both multiply the same masked weight. The gradient is drawn twice: normal, and with a spread of magnitudes as gradients
have it (each value times e^(2 n), n normal). For dx the format of dy is compared, too: e4m3 times e4m3, as the library
does it, against e5m2 times e5m2, the only other pair that cuSPARSELt multiplies; both are emulated with exact sums.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import float8
from benchmarks.timing import device
from semisparse import SemiSparseLinear, SparseConfig

SHAPES = ((16384, 4096, 11008), (16384, 2048, 8192))
"""M x K x N."""
GRADIENTS = {"normal": 0.0, "spread": 2.0}
OURS, TORCHAO, PAIR, OTHER_PAIR = "fp8 + 2:4", "torchao float8", "dx, e4m3 x e4m3", "dx, e5m2 x e5m2"
LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}


def benchmark(tokens: int, in_features: int, out_features: int) -> dict[str, Any]:
    """Signal to noise of one layer's results.

    Args:
        tokens: M.
        in_features: K.
        out_features: N.

    Returns:
        By gradient and row: decibels of y, dx and dW.

    Raises:
        MissingPeerError: torchao is not there.
    """
    generator = torch.Generator(device()).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device())

    weight, x = draw(out_features, in_features) * 0.02, draw(tokens, in_features)
    ours = SemiSparseLinear(
        in_features,
        out_features,
        bias=False,
        device=device(),
        dtype=torch.bfloat16,
        config=SparseConfig(precision="fp8"),
    )
    ours.weight.data.copy_(weight)
    masked = ours.pruned_weight()
    theirs = nn.Sequential(nn.Linear(in_features, out_features, bias=False, device=device(), dtype=torch.bfloat16))
    theirs[0].weight.data.copy_(masked)
    theirs = float8.converted(theirs, ["0"])
    noise: dict[str, dict[str, dict[str, float]]] = {}
    for name, spread in GRADIENTS.items():
        dy = (draw(tokens, out_features) * torch.exp(spread * draw(tokens, out_features))).bfloat16()
        noise[name] = _noise({OURS: ours, TORCHAO: theirs}, x.bfloat16(), masked, dy)
    return {"mkn": [tokens, in_features, out_features], "decibels": noise, "torchao": float8.checked_version()}


def _noise(layers: dict[str, nn.Module], x: Tensor, masked: Tensor, dy: Tensor) -> dict[str, dict[str, float]]:
    exact = {"y": x.double() @ masked.double().T, "dx": dy.double() @ masked.double()}
    exact["dW"] = dy.double().T @ x.double()
    found = {}
    for name, layer in layers.items():
        layer.zero_grad(set_to_none=True)
        given = x.clone().requires_grad_()
        y = layer(given)
        y.backward(dy)
        weight_grad = next(layer.parameters()).grad
        results = {"y": y.detach(), "dx": given.grad, "dW": weight_grad}
        found[name] = {key: _decibels(value, exact[key]) for key, value in results.items()}
    for name, dtype in ((PAIR, torch.float8_e4m3fn), (OTHER_PAIR, torch.float8_e5m2)):
        product = _rounded(dy, dtype) @ _rounded(masked, dtype)
        found[name] = {"dx": _decibels(product.bfloat16(), exact["dx"])}
    return found


def _rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """values as one scale, a power of two, and codes of this dtype give them back; fp64."""
    scale = 2.0 ** math.floor(math.log2(LARGEST[dtype] / values.abs().max().item()))
    return (values.float() * scale).to(dtype).double() / scale


def _decibels(found: Tensor | None, exact: Tensor) -> float:
    assert found is not None
    return 20 * math.log10(exact.norm().item() / (found.double() - exact).norm().item())
