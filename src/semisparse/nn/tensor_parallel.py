"""Layers whose weight tensor parallelism shards: each rank computes with its own part, which it prunes by itself.

A tile of a mask never straddles ranks, because each rank holds whole tiles. So the masks are those of the whole weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from semisparse.errors import ShapeError, TensorError
from semisparse.pattern import GROUP

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""input, weight, bias -> output."""

UNSHARD = (
    "a mask needs whole tiles. With FSDP2 call unshard() of the module that shards it before, on all ranks, and "
    "reshard() afterwards; or look at a model that a full state dict was loaded into"
)
"""The way out where something reads a mask of a sharded weight outside of a forward."""


def is_sharded(weight: Tensor) -> bool:
    """Whether weight is a DTensor."""
    return hasattr(weight, "device_mesh")  # what torch.compile, too, sees


def sharded_linear(product: Product, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """product of the parts that the ranks hold, along each axis of the weight's mesh on its own.

    - weight sharded along its rows ("colwise"): input is replicated, the output is sharded along its features;
    - along its columns ("rowwise"): input is sharded along its features, the output is a sum over ranks; the bias is
      added by the first rank;
    - replicated: input may be sharded along its tokens, and so is the output.

    Input is redistributed where it is placed otherwise.

    Args:
        product: Of plain tensors.
        input: A DTensor (..., K).
        weight: A DTensor (N, K).
        bias: A DTensor (N,), or None.

    Returns:
        A DTensor (..., N).

    Raises:
        TensorError: input is not a DTensor, or weight is placed in another way.
        ShapeError: A rank does not hold a multiple of 4 rows and columns.
    """
    if not is_sharded(input):
        raise TensorError(
            "the weight is sharded (a DTensor) and the input is a plain tensor: call the model that was sharded, not a "
            "part of it (fully_shard), or let parallelize_module prepare the input (tensor parallelism)"
        )
    return _sharded(product, input, weight, bias)  # type: ignore[arg-type]


def _sharded(product: Product, input: DTensor, weight: DTensor, bias: DTensor | None) -> Tensor:
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    _check(weight)
    mesh, last = weight.device_mesh, input.dim() - 1
    taken: list[Any] = []  # how input must be placed, and so on for gradients and the output
    grad_input: list[Any] = []
    grad_weight: list[Any] = []
    bias_placed: list[Any] = []
    placed: list[Any] = []
    for held, given in zip(weight.placements, input.placements, strict=True):
        if held.is_shard(0):
            taken, grad_input = [*taken, Replicate()], [*grad_input, Partial()]
            grad_weight, bias_placed, placed = [*grad_weight, held], [*bias_placed, Shard(0)], [*placed, Shard(last)]
        elif held.is_shard():
            taken, grad_input = [*taken, Shard(last)], [*grad_input, Shard(last)]
            grad_weight, bias_placed, placed = [*grad_weight, held], [*bias_placed, Replicate()], [*placed, Partial()]
        else:
            tokens = given if given.is_shard() and not given.is_shard(last) else Replicate()
            taken, grad_input, placed = [*taken, tokens], [*grad_input, tokens], [*placed, tokens]
            grad_weight, bias_placed = [*grad_weight, Partial() if tokens.is_shard() else held], [*bias_placed, held]
    x = _arrived(input.redistribute(mesh, taken)).to_local(grad_placements=grad_input)
    added = None
    if bias is not None:
        # Where the output is a sum over ranks, the first one adds the bias; gradients are sums over what was added.
        sums = [Partial() if out.is_partial() or part.is_partial() else one
                for one, out, part in zip(bias_placed, placed, grad_weight, strict=True)]  # fmt: skip
        added = bias.redistribute(mesh, bias_placed).to_local(grad_placements=sums)
        position: list[int] = list(mesh.get_coordinate() or ())
        if any(at and out.is_partial() for at, out in zip(position, placed, strict=True)):
            added = added * 0
    y = product(x, weight.to_local(grad_placements=grad_weight), added)
    return DTensor.from_local(y, mesh, placed)


def _arrived(input: DTensor) -> DTensor:
    """input, waited for: parallelize_module hands over what is still on its way, as a tensor subclass."""
    wait = getattr(input._local_tensor, "wait", None)
    if wait is not None and not torch.compiler.is_compiling():
        input._local_tensor = wait()
    return input


def _check(weight: DTensor) -> None:
    """Raise the error for a weight whose parts cannot be pruned one by one; the same one on all ranks."""
    for axis, held in enumerate(weight.placements):
        if held.is_replicate():
            continue
        if not (held.is_shard(0) or held.is_shard(1)):
            raise TensorError(
                f"weight is placed as {weight.placements}; a semi-sparse layer takes Replicate, Shard(0) and Shard(1)"
            )
        dim, ranks = int(held.is_shard(1)), weight.device_mesh.size(axis)
        if weight.shape[dim] % (GROUP * ranks):
            raise ShapeError(
                f"weight is {tuple(weight.shape)}, and {ranks} ranks share its {('rows', 'columns')[dim]}: each must "
                f"hold a multiple of {GROUP} of them. Leave the layer dense (exclude=), or use fewer ranks"
            )
