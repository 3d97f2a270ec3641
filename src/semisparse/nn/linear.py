"""The layer with a 2:4 weight."""

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from semisparse import functional, ops
from semisparse.config import Operand, SparseConfig
from semisparse.nn.base import SemiSparseBase
from semisparse.reference.masks import from_codes


class SemiSparseLinear(SemiSparseBase):
    """nn.Linear whose weight is pruned to 2:4 by magnitude at every forward; the stored weight stays dense.

    x: (..., K), any leading sizes, zero tokens included. weight: (N, K); N and K multiples of 4. y: (..., N).
    Dtypes: fp64, fp32, fp16, bf16, and any of them under autocast (the mask is then chosen from the stored weight).
    Gradients: of x through the pruned weight, of the weight straight through to the dense weight. Each forward sees
    the weight as it is then. Recipe: arXiv 2102.04010 (straight-through 2:4), masks of arXiv 2102.08124.
    """

    operand: ClassVar[Operand] = "weight"
    config: SparseConfig = SparseConfig(operand="weight")
    # Set only inside nn.reuse_packed: the packed weight (W~, W~^T) to use instead of packing again.
    _packed: tuple[Tensor, Tensor] | None = None
    # Set only by a recipe's schedule, which owns it: tile codes, or the scale of mask "soft".
    _frozen: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """y = x W~^T + b; plain F.linear while sparse_enabled is False. Raises ShapeError, TensorError."""
        if not self.sparse_enabled:
            return F.linear(x, self.weight, self.bias)
        return functional.semi_sparse_linear(
            x,
            self.weight,
            self.bias,
            mask=self.config.mask,
            frozen=self._frozen,
            engine=self.config.engine,
            packed=self._packed,
        )

    def pruned_weight(self) -> Tensor:
        """The weight as the sparse forward uses it: N x K, detached, in the parameter's dtype.

        Raises ConfigError for mask "soft" outside its recipe.
        """
        mask = functional.frozen_mask(self.config.mask, self._frozen)
        return ops.prune(self.weight.detach(), self.weight.dtype, mask, self._frozen)

    def chosen_mask(self) -> Tensor:
        """The mask (N x K, bool) that the weight would choose now, whatever a recipe holds frozen."""
        mask = "row" if self.config.mask == "soft" else self.config.mask
        return from_codes(ops.tile_codes(self.weight.detach(), mask))
