"""Running a model once and restoring its state."""

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.nn.parameter import is_lazy

from semisparse import calls
from semisparse.errors import ConfigError
from semisparse.nn import SemiSparseBase


@contextmanager
def unchanged(model: nn.Module, inputs: Any) -> Iterator[None]:
    """Restore, after the block, what a forward and backward pass inside it may have changed.

    That is: parameters and buffers (the tensors and their values), gradients of parameters and of inputs, training
    flags, and the random number generators of Python, NumPy (if it is loaded) and torch on all devices. Inside the
    block all gradients start as None. Needs memory for one copy of parameters and buffers.

    Args:
        model: The model.
        inputs: Tensors in any nesting of containers.

    Raises:
        ConfigError: A parameter or buffer has no size yet.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise ConfigError(f"model: {name} is lazy, without a size yet: run one forward first")
    modules = list(model.modules())
    flags = [module.training for module in modules]
    tables: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (table, dict(table)) for module in modules for table in (module._parameters, module._buffers)
    ]
    tensors = {id(tensor): tensor for _, held in tables for tensor in held.values() if tensor is not None}
    values = {key: tensor.detach().clone() for key, tensor in tensors.items()}
    leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.is_leaf]
    gradients = [(leaf, leaf.grad) for leaf in (*tensors.values(), *leaves)]
    # An optimizer may step in these hooks. The table belongs to autograd, so it is emptied instead of replaced.
    hooks = [(table, dict(table)) for leaf in tensors.values() if (table := leaf._post_accumulate_grad_hooks)]
    called = [(layer, layer._called) for layer in modules if isinstance(layer, SemiSparseBase)]
    generators = _generator_states()
    for leaf, _ in gradients:
        leaf.grad = None
    for table, _ in hooks:
        table.clear()
    try:
        with calls.unnoticed():
            yield
    finally:
        for module, flag in zip(modules, flags, strict=True):
            module.training = flag
        for table, held in tables:
            table.clear()
            table.update(held)
        for key, tensor in tensors.items():
            _restore(tensor, values[key])
        for table, theirs in hooks:
            table.update(theirs)
        for leaf, gradient in gradients:
            leaf.grad = gradient
        for layer, was_called in called:
            if not was_called:
                layer.__dict__.pop("_called", None)
        _restore_generators(generators)


def _restore(tensor: Tensor, value: Tensor) -> None:
    """Write value back if it differs; the version counter stays, so that saved graphs and packings remain valid."""
    if tensor.is_meta or torch.equal(tensor.detach(), value):
        return
    with torch.no_grad(), _unsafe_preserve_version_counter(tensor):
        tensor.copy_(value)


def _generator_states() -> dict[str, Any]:
    states: dict[str, Any] = {"python": random.getstate(), "cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state_all()
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        states["numpy"] = numpy.random.get_state()
    return states


def _restore_generators(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    torch.set_rng_state(states["cpu"])
    if "cuda" in states:
        torch.cuda.set_rng_state_all(states["cuda"])
    if "numpy" in states:
        sys.modules["numpy"].random.set_state(states["numpy"])
