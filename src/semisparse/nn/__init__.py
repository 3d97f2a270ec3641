"""Layers: drop-in subclasses of nn.Linear whose weight or input is pruned to 2:4 at each forward."""

from semisparse.nn.activation import SemiSparseActivationLinear
from semisparse.nn.base import SemiSparseBase
from semisparse.nn.linear import SemiSparseLinear
from semisparse.nn.packed_weights import PackedWeights
from semisparse.nn.registry import register_linear
from semisparse.nn.reuse import reuse_packed

__all__ = [
    "PackedWeights",
    "SemiSparseActivationLinear",
    "SemiSparseBase",
    "SemiSparseLinear",
    "register_linear",
    "reuse_packed",
]
