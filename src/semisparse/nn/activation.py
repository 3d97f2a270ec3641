"""The layer with a 2:4 input."""

import warnings
from typing import ClassVar

import torch
from torch import Tensor

from semisparse import calls, functional
from semisparse.config import Operand, SparseConfig
from semisparse.errors import TokenMixingWarning
from semisparse.nn.base import SemiSparseBase
from semisparse.nn.tensor_parallel import is_sharded, sharded_linear

_TOKEN_MIXING = (
    "a layer with a pruned activation computes a token from a tile of 4 neighbouring tokens: in a causal model a token "
    "then depends on later ones, and in evaluation on what else is in the batch. Prune the weight there "
    "(SparseConfig(weight='transposable')), or finish dense. This warning is given once per process; silence it with "
    "warnings.filterwarnings('ignore', category=semisparse.TokenMixingWarning)"
)
_warned = False


class SemiSparseActivationLinear(SemiSparseBase):
    """nn.Linear whose input is pruned by 4x4 tiles over (tokens, features), so that it is 2:4 along both.

    Forward product and weight gradient then each have a 2:4 operand; the input gradient is dense and passes straight
    through the pruning.

    input: (..., K), or a jagged nested tensor of such rows. The leading sizes are flattened to tokens in order. Any
    number of tokens fits; a last partial tile is filled up with zero rows. Dtypes as SemiSparseLinear.

    Which entries of a token are kept depends on the other tokens of its tile. In a causal model the output for a token
    therefore depends on up to 3 later tokens, and in evaluation on the batch: prune the weight there. The first such
    layer of a process gives a TokenMixingWarning.

    Args and Raises are those of SemiSparseBase.
    """

    operand: ClassVar[Operand] = "activation"
    sparse_config: SparseConfig = SparseConfig(weight=None, activation="transposable")

    @classmethod
    def _announce(cls) -> None:
        super()._announce()
        global _warned
        if not _warned:
            warnings.warn(_TOKEN_MIXING, TokenMixingWarning, stacklevel=3)
            _warned = True  # not reached if the warning is an error, so that a second attempt fails like the first

    def _sparse_forward(self, input: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            calls.note_tokens(op=False)
        if is_sharded(self.weight):
            return sharded_linear(self._product, input, self.weight, self.bias)
        return self._product(input, self.weight, self.bias)

    def _product(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return functional.semi_sparse_activation_linear(input, weight, bias, backend=self.sparse_config.backend)

    def pruned_weight(self) -> Tensor:
        """The weight itself, detached: this layer never prunes its weight."""
        return self.weight.detach()
