"""Layers and inputs of the numerical checks, what a step of them gives, and the same by the specification."""

import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semisparse.config import SparseConfig
from semisparse.errors import TokenMixingWarning
from semisparse.nn import SemiSparseActivationLinear, SemiSparseLinear
from semisparse.reference import linear as reference
from semisparse.reference import mvue, mvue_fp8

Results = dict[str, Tensor]

SEED = -(2**50) + 3
"""Of what is drawn at random; 64 bits, so that both words of the key count."""

SMALL = (200, 64, 96)
"""M, K, N at which sums of fp8's whole numbers are exact on any tensor core, also where it keeps 13 bits of them."""


@dataclass(frozen=True)
class Setting:
    """Where the checks run.

    Attributes:
        device: The GPU, or the CPU.
        sizes: M, K and N of operands of any values.
        no_engine: Why there are no sparse products; "" if there are.
    """

    device: torch.device
    sizes: tuple[int, int, int]
    no_engine: str = ""

    @property
    def backend(self) -> Any:
        """Sparse products without fallback where they must run; else masked dense, which never leaves a sample out."""
        if not self.no_engine:
            return "cusparselt"
        return "auto" if self.device.type == "cpu" else "dense"

    def normal(self, *shape: int, seed: int, dtype: torch.dtype) -> Tensor:
        """Normal numbers, the same on each device."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(shape, generator=generator).to(self.device, dtype)

    def whole(self, *shape: int, seed: int, dtype: torch.dtype, limit: int) -> Tensor:
        """Whole numbers from -limit to limit, the same on each device."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(-limit, limit + 1, shape, generator=generator).to(self.device, dtype)


@dataclass(frozen=True)
class Step:
    """A layer with the operands of one forward and backward.

    Attributes:
        layer: The layer.
        x: Its input, M x K.
        dy: Gradient of its output, M x N.
    """

    layer: nn.Linear
    x: Tensor
    dy: Tensor

    def run(self) -> Results:
        """y, dx, dW and db as training sees them."""
        self.layer.zero_grad(set_to_none=True)
        x = self.x.clone().requires_grad_()
        y = self.layer(x)
        y.backward(self.dy)
        found = {"y": y.detach(), "dx": x.grad, "dW": self.layer.weight.grad, "db": self.layer.bias.grad}
        return {name: value for name, value in found.items() if value is not None}


def normal_step(setting: Setting, config: SparseConfig, dtype: torch.dtype) -> Step:
    """A layer and operands of normal numbers."""
    m, k, n = setting.sizes
    layer = build(setting, config, k, n, dtype)
    with torch.no_grad():
        layer.weight.copy_(setting.normal(n, k, seed=1, dtype=dtype) / k**0.5)
        layer.bias.copy_(setting.normal(n, seed=2, dtype=dtype))
    return Step(layer, setting.normal(m, k, seed=3, dtype=dtype), setting.normal(m, n, seed=4, dtype=dtype))


def whole_step(setting: Setting, config: SparseConfig, sizes: tuple[int, int, int] = SMALL, limit: int = 20) -> Step:
    """A layer and operands of whole numbers in bf16; those of dy are small."""
    (m, k, n), dtype = sizes, torch.bfloat16
    layer = build(setting, config, k, n, dtype)
    with torch.no_grad():
        layer.weight.copy_(setting.whole(n, k, seed=1, dtype=dtype, limit=limit))
        layer.bias.copy_(setting.whole(n, seed=2, dtype=dtype, limit=limit))
    x = setting.whole(m, k, seed=3, dtype=dtype, limit=limit)
    return Step(layer, x, setting.whole(m, n, seed=4, dtype=dtype, limit=2))


def build(setting: Setting, config: SparseConfig, k: int, n: int, dtype: torch.dtype) -> nn.Linear:
    """A semi-sparse layer with the fixed seed, where it samples."""
    kind = SemiSparseLinear if config.operand == "weight" else SemiSparseActivationLinear
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TokenMixingWarning)  # nothing is trained here
        layer = kind(k, n, device=setting.device, dtype=dtype, config=config)
    if config.grad_output is not None:
        layer.held_seed = torch.tensor(SEED, device=setting.device)  # as a schedule sets it
    return layer


def in_16_bits(step: Step, weight_mask: Tensor | None, dtype: torch.dtype, drawn: Tensor | None = None) -> Results:
    """The same by F.linear and autograd of the pruned operands.

    Args:
        step: Of a layer that computes in 16 bits.
        weight_mask: What is kept of W; None if the input is pruned.
        dtype: To compute in.
        drawn: S(dy), where dW is sampled.
    """
    weight, bias = step.layer.weight.detach(), step.layer.bias.detach()
    x = reference.prune_tokens(step.x) if weight_mask is None else step.x
    pruned = weight if weight_mask is None else reference.prune(weight, weight_mask)
    leaves = [one.to(dtype, copy=True).requires_grad_() for one in (x, pruned, bias)]
    y = F.linear(*leaves)
    y.backward(step.dy.to(dtype))
    dx, dw, db = (leaf.grad for leaf in leaves)
    assert dx is not None and dw is not None and db is not None
    if drawn is not None:
        dw = reference.grad_weight(drawn.to(dtype), leaves[0].detach())
    return {"y": y.detach(), "dx": dx, "dW": dw, "db": db}


def drawn_sample(step: Step) -> Tensor:
    """S(dy) by the specification, computed on the CPU."""
    return mvue.sample(step.dy.cpu(), SEED).matrix.to(step.dy.device)


def in_fp8(step: Step, config: SparseConfig, mask: Tensor | None) -> Results:
    """The same by the specification's equations of fp8, on the CPU.

    Args:
        step: Of a layer in fp8.
        config: Its settings.
        mask: What is kept of W; None for all.
    """
    weight, bias = step.layer.weight.detach().cpu(), step.layer.bias.detach().cpu()
    x, dy = step.x.cpu(), step.dy.cpu()
    mask = None if mask is None else mask.cpu()
    both_ways = mask is not None and config.products["grad_input"] == "sparse fp8"
    sampled = config.grad_output is not None
    dw = mvue_fp8.grad_weight(dy, x, weight.dtype, SEED) if sampled else reference.fp8_grad_weight(dy, x, weight.dtype)
    return {
        "y": reference.fp8_forward(x, weight, mask, bias, dy.dtype),
        "dx": reference.fp8_grad_input(dy, weight, mask, x.dtype, sparse=both_ways),
        "dW": dw,
        "db": dy.double().sum(0).to(bias.dtype),
    }
