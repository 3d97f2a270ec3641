"""The layer with a 2:4 input."""

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from semisparse import functional
from semisparse.config import Operand, SparseConfig
from semisparse.nn.base import SemiSparseBase


class SemiSparseActivationLinear(SemiSparseBase):
    """nn.Linear whose input is pruned by 4x4 tiles over (tokens, features), so it is 2:4 along both.

    Forward product and weight gradient then each have a 2:4 operand; the input gradient is dense and passes straight
    through the pruning. x: (..., K), tokens are the leading sizes flattened in order, any number of them (a last
    partial tile counts zero rows). weight: (N, K); N and K multiples of 4. Dtypes as SemiSparseLinear.
    """

    operand: ClassVar[Operand] = "activation"
    config: SparseConfig = SparseConfig(operand="activation")

    def forward(self, x: Tensor) -> Tensor:
        """y = x~ W^T + b; plain F.linear while sparse_enabled is False. Raises ShapeError, TensorError."""
        if not self.sparse_enabled:
            return F.linear(x, self.weight, self.bias)
        return functional.semi_sparse_activation_linear(x, self.weight, self.bias, engine=self.config.engine)

    def pruned_weight(self) -> Tensor:
        """The weight itself, detached: this layer never prunes its weight."""
        return self.weight.detach()
