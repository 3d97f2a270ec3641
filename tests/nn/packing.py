"""Models with packed weights, and what they must compute: what a copy does, which packs at each forward."""

import copy
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor, nn

from semisparse import PackedWeights, SemiSparseLinear, SparseConfig
from semisparse.masks import MaskName
from semisparse.nn.pack_together import Keep
from semisparse.testing import assert_bit_equal, small_integers

BF16 = torch.bfloat16
X = small_integers((8, 16), seed=1, dtype=BF16)


def model_of(layers: int = 3, dtype: torch.dtype = BF16, mask: MaskName = "transposable") -> nn.Sequential:
    config = SparseConfig(weight=mask)
    return nn.Sequential(*(SemiSparseLinear(16, 16, dtype=dtype, config=config) for _ in range(layers)))


class Mixed(nn.Module):
    """fp32 layers that run under fp16 autocast, beside bf16 layers that run outside of it."""

    def __init__(self, narrow_first: bool) -> None:
        super().__init__()
        self.wide, self.narrow, self.narrow_first = model_of(2, torch.float32), model_of(2), narrow_first

    def under_autocast(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.float16):
            return self.wide(x.float())

    def forward(self, x: Tensor) -> Tensor:
        if self.narrow_first:
            return self.under_autocast(self.narrow(x))
        return self.narrow(self.under_autocast(x).bfloat16())


ALIVE: deque[PackedWeights] = deque(maxlen=16)
"""Packed weights live as long as their owner."""


def packed(model: nn.Module, keep: Keep = "both") -> PackedWeights:
    weights = PackedWeights(model, keep=keep)
    weights.pack()
    ALIVE.append(weights)
    return weights


def results(model: nn.Module, x: Tensor = X, call: Callable[[Tensor], Tensor] | None = None) -> list[Tensor]:
    """Output and gradients."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    output = (model if call is None else call)(x)
    output.float().square().sum().backward()
    return [output.detach(), x.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def expect_fresh(model: nn.Module, x: Tensor = X, call: Callable[[Tensor], Tensor] | None = None) -> None:
    """model, called as call, computes what a copy of it does, which packs at each forward."""
    other = copy.deepcopy(model)
    assert all(layer._packed is None for layer in other.modules() if isinstance(layer, SemiSparseLinear))
    for ours, expected in zip(results(model, x, call), results(other, x), strict=True):
        assert_bit_equal(ours, expected)


def in_place(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
