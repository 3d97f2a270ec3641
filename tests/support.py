"""What several test files share: masked-dense layers computed with brute-force masks."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semisparse import SemiSparseActivationLinear, SemiSparseLinear, SparseConfig
from semisparse.config import Backend
from semisparse.nn import SemiSparseBase
from tests.reference import brute

LAYER_CLASSES = [SemiSparseLinear, SemiSparseActivationLinear]


def config_of(operand: str, mask: str = "transposable", backend: Backend = "auto") -> SparseConfig:
    """The config that prunes operand ("weight" or "activation") and leaves the other one dense."""
    pruned = {"weight": None, "activation": None} | {operand: mask}
    return SparseConfig(**pruned, backend=backend)  # type: ignore[arg-type]


class MaskArguments(NamedTuple):
    """A mask as ops take it: its name and, where a recipe holds something, tile codes or a scale."""

    mask: str
    codes: Tensor | None = None
    scale: Tensor | None = None

    @property
    def held(self) -> dict[str, Tensor | None]:
        """The arguments of SemiSparseLinear.hold, with tensors of their own."""
        return {name: None if t is None else t.clone() for name, t in (("codes", self.codes), ("scale", self.scale))}

    def to(self, device: str) -> "MaskArguments":
        """On another device."""
        return MaskArguments(self.mask, *(None if t is None else t.to(device) for t in (self.codes, self.scale)))


def held_by(layer: nn.Module) -> Tensor | None:
    """The tensor that a recipe holds on layer, None where there is none."""
    codes, scale = getattr(layer, "held_codes", None), getattr(layer, "held_scale", None)
    assert codes is None or scale is None
    return scale if codes is None else codes


class Result(NamedTuple):
    """Output and gradients of one linear layer."""

    output: Tensor
    grad_input: Tensor
    grad_weight: Tensor
    grad_bias: Tensor | None


def brute_mask(matrix: Tensor) -> Tensor:
    """The transposable mask of a matrix (R x C, multiples of 4), by brute force."""
    return torch.from_numpy(brute.transposable_matrix(matrix.detach().float().numpy()))


def brute_token_mask(x: Tensor) -> Tensor:
    """The mask of x (M x K) over (tokens, features), by brute force over x with zero rows appended."""
    rows = x.detach().float().numpy()
    padded = np.concatenate([rows, np.zeros((-len(rows) % 4, rows.shape[1]), np.float32)])
    return torch.from_numpy(brute.transposable_matrix(padded)[: len(rows)])


def masked_dense(
    layer_class: type[SemiSparseBase], x: Tensor, weight: Tensor, bias: Tensor | None, grad_output: Tensor
) -> Result:
    """Autograd of F.linear on the operands with the brute-force mask applied; straight-through for the pruned one."""
    x, weight = x.detach(), weight.detach()
    if layer_class is SemiSparseLinear:
        weight = torch.where(brute_mask(weight), weight, 0).contiguous()
    else:
        tokens = x.reshape(x.shape[:-1].numel(), x.shape[-1])
        x = torch.where(brute_token_mask(tokens), tokens, 0).contiguous().view(x.shape)
    operands = [leaf.detach().requires_grad_() for leaf in (x, weight, bias) if leaf is not None]
    output = F.linear(*operands)
    grads = torch.autograd.grad(output, operands, grad_output)
    return Result(output.detach(), grads[0], grads[1], grads[2] if bias is not None else None)


def run_layer(layer: nn.Module, x: Tensor, grad_output: Tensor) -> Result:
    """Output and gradients of layer as training sees them."""
    x = x.detach().requires_grad_()
    layer.zero_grad()
    output = layer(x)
    output.backward(grad_output)
    assert x.grad is not None
    return Result(output.detach(), x.grad, layer.weight.grad, None if layer.bias is None else layer.bias.grad)


def make_layer(layer_class: type[SemiSparseBase], weight: Tensor, bias: Tensor | None) -> SemiSparseBase:
    """A layer that holds copies of weight (N x K) and bias."""
    layer = layer_class(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype)
    layer.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone())
    return layer


def through_a_file(model: nn.Module) -> nn.Module:
    """What torch.load makes of what torch.save wrote of model."""
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "torch.save": through_a_file,
}
"""Every way to copy a model, a schedule or packed weights."""
