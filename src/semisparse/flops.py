"""FLOPs of the products that ops compute, for torch.utils.flop_counter.FlopCounterMode, which counts 0 for unknown ops.

A packed product counts as the dense product that it replaces, 2 M N K, so that utilisation and training cost can be
compared with those of the dense model. The sparse tensor cores do half of these multiplications; a dense product that
the engine chose inside the op does all of them. Products in fp8 count their tokens as padded to a multiple of 16.

Choosing masks, pruning and packing have no formula, as elementwise operations have none in torch: they take time, but
they are not FLOPs of the model.
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch

from semisparse import ops  # noqa: F401 - the ops must be registered before they are named

Shape = Sequence[int]


def _packed_matmul(x: Shape, packed: Shape, bias: Shape | None, out_features: int, *_: Any, **__: Any) -> int:
    return 2 * prod(x) * out_features


def _packed_tokens_matmul(packed: Shape, weight: Shape, bias: Shape | None, tokens: int, *_: Any, **__: Any) -> int:
    return 2 * tokens * weight[0] * weight[1]


def _linear(x: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    return 2 * prod(x) * weight[0]


def _packed_tokens_grad_weight(packed_t: Shape, grad_output: Shape, in_features: int, *_: Any, **__: Any) -> int:
    return 2 * grad_output[0] * grad_output[1] * in_features


def _sampled_grad_weight(grad_output: Shape, x: Shape, *_: Any, **__: Any) -> int:
    return 2 * grad_output[0] * grad_output[1] * x[1]


def _fp8_product(x8: Shape, packed: Shape, out_features: int, *_: Any, **__: Any) -> int:
    return 2 * prod(x8) * out_features


def _fp8_sampled_product(packed: Shape, x8t: Shape, out_features: int, *_: Any, **__: Any) -> int:
    return 2 * prod(x8t) * out_features


def _fp8_sampled_grad_weight(grad_output: Shape, x8t: Shape, *_: Any, **__: Any) -> int:
    return 2 * prod(x8t) * grad_output[1]


def _fp8_dense_product(a8: Shape, b8: Shape, *_: Any, **__: Any) -> int:
    return 2 * prod(a8) * b8[0]


def flop_formulas() -> dict[Any, Callable[..., int]]:
    """Op -> formula over the shapes of its arguments, in the form of FlopCounterMode's custom_mapping."""
    registered = torch.ops.semisparse
    return {
        registered.packed_matmul: _packed_matmul,
        registered.pack_linear: _linear,
        registered.packed_linear: _linear,
        registered.packed_tokens_matmul: _packed_tokens_matmul,
        registered.packed_tokens_linear: _linear,
        registered.packed_tokens_grad_weight: _packed_tokens_grad_weight,
        registered.fp8_product: _fp8_product,
        registered.fp8_dense_product: _fp8_dense_product,
        registered.fp8_sampled_product: _fp8_sampled_product,
        registered.fp8_sampled_grad_weight: _fp8_sampled_grad_weight,
        registered.fp8_linear: _linear,
        registered.sampled_linear: _linear,
        registered.sampled_grad_weight: _sampled_grad_weight,
    }


def register_flop_formulas() -> None:
    """Register the formulas of the packed products with FlopCounterMode, once per process.

    Building or swapping a layer calls it. A counter uses the formulas that were registered when it was constructed. A
    formula that is registered for one of these ops already stays. Importing semisparse does not call this function,
    because it imports torch.utils.flop_counter, which imports triton if that is installed.
    """
    from torch.utils import flop_counter

    for op, formula in flop_formulas().items():
        if op not in flop_counter.flop_registry:  # registering twice raises
            flop_counter.register_flop_formula(op)(formula)
