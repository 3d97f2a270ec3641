"""The layer with a 2:4 weight."""

from typing import ClassVar

from torch import Tensor

from semisparse import functional, ops
from semisparse.config import Operand, SparseConfig
from semisparse.nn.base import SemiSparseBase
from semisparse.nn.packed_weights import PackedWeight, usable
from semisparse.reference.masks import from_codes


class SemiSparseLinear(SemiSparseBase):
    """nn.Linear whose weight is pruned to 2:4 by magnitude at every forward; the stored weight stays dense.

    input: (..., K), any leading sizes, zero tokens included; jagged nested tensors too. weight: (N, K); N and K
    multiples of 4. Output: (..., N).
    Dtypes: fp64, fp32, fp16, bf16, and any of them under autocast (the mask is then chosen from the stored weight).
    Gradients: of the input through the pruned weight, of the weight straight through to the dense weight. Each forward
    sees the weight as it is then. Recipe: arXiv 2102.04010 (straight-through 2:4), masks of arXiv 2102.08124.
    """

    operand: ClassVar[Operand] = "weight"
    sparse_config: SparseConfig = SparseConfig(operand="weight")
    # Set only inside nn.reuse_packed: the packed weight to use instead of packing again.
    _packed: PackedWeight | None = None
    # Set only by a recipe's schedule, which owns it: tile codes, or the scale of mask "soft".
    _frozen: Tensor | None = None

    def _sparse_forward(self, input: Tensor) -> Tensor:
        return functional.semi_sparse_linear(
            input,
            self.weight,
            self.bias,
            mask=self.sparse_config.mask,
            frozen=self._frozen,
            engine=self.sparse_config.engine,
            packed=None if self._packed is None else usable(self, input),
        )

    def pruned_weight(self) -> Tensor:
        """The weight as the sparse forward uses it: N x K, detached, in the parameter's dtype.

        Raises ConfigError for mask "soft" outside its recipe.
        """
        mask = functional.frozen_mask(self.sparse_config.mask, self._frozen)
        return ops.prune(self.weight.detach(), self.weight.dtype, mask, self._frozen)

    def chosen_mask(self) -> Tensor:
        """The mask (N x K, bool) that the weight would choose now, whatever a recipe holds frozen."""
        mask = "row" if self.sparse_config.mask == "soft" else self.sparse_config.mask
        return from_codes(ops.tile_codes(self.weight.detach(), mask))
