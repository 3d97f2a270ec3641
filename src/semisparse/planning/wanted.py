"""The distinct products of the sparse engine that a model's layers need in one step, found by one forward."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from semisparse.errors import NoLayerMatchedError
from semisparse.gemm.autotune.autotuner import Asked, autotuner
from semisparse.gemm.autotune.store import canonical
from semisparse.gemm.engine import engine
from semisparse.gemm.problem import Problem
from semisparse.planning import collect
from semisparse.planning.problems import DTYPES
from semisparse.planning.products import engine_products, in_fp8, why_no_engine
from semisparse.surgery.layers import semi_sparse_layers
from semisparse.surgery.selection import FoundLayer


@dataclass
class Wanted:
    """A problem that the model's layers need.

    Attributes:
        problem: A product, or a weight gradient that may be sampled; with the most tokens of its bucket that were met.
        device: CUDA device.
        products: What needs it.
        work: Of all its products in a step, up to a factor.
    """

    problem: Asked
    device: torch.device
    products: list[str]
    work: float = 0.0

    @property
    def index(self) -> int:
        """Of the device, as the engine counts; -1 for the CPU."""
        return -1 if self.device.index is None else self.device.index

    @property
    def key(self) -> str:
        """The tuning key as text; problems of a device without an engine have one of their own."""
        if engine().available(self.index).ok:
            return canonical(autotuner().key(self.problem, self.index))
        return f"{self.device}: {self.problem.bucket}"


def wanted_by(
    model: nn.Module, inputs: tuple[Any, ...], keywords: Mapping[str, Any]
) -> tuple[dict[str, Wanted], dict[str, str]]:
    """The problems of one forward and backward by their tuning key, most work first; and the layers that have none.

    Args:
        model: With semi-sparse layers.
        inputs: Of the forward.
        keywords: Of the forward.

    Raises:
        NoLayerMatchedError: model has no semi-sparse layer.
        Exception: Whatever the model raises.
    """
    layers = semi_sparse_layers(model)
    if not layers:
        raise NoLayerMatchedError(f"model={type(model).__name__} has no semi-sparse layer to tune; call sparsify first")
    with autotuner().paused():
        uses = collect.calls_of(
            model, [(FoundLayer(name, layer, ()), "") for name, layer in layers.items()], inputs, keywords
        )
    found: dict[str, Wanted] = {}
    without: dict[str, str] = {}
    for use, layer in zip(uses, layers.values(), strict=True):
        weight, config = layer.weight, layer.sparse_config
        if use.stays:
            without[use.name] = use.stays
        for call, count in use.calls:
            dtype = DTYPES[call.dtype]
            if why := why_no_engine(weight, dtype, config):
                without[use.name] = why
                continue
            for product, problem in engine_products(call, config, in_fp8(weight, dtype, config)).items():
                _add(found, problem, weight.device, f"{use.name or '(root)'} {product}", count)
    return dict(sorted(found.items(), key=lambda pair: -pair[1].work)), without


def _add(found: dict[str, Wanted], problem: Asked, device: torch.device, product: str, count: float) -> None:
    new = Wanted(problem, device, [])
    one = found.setdefault(new.key, new)
    if product not in one.products:
        one.products.append(product)
    one.problem = max(one.problem, problem, key=lambda each: each.tokens)
    if isinstance(problem, Problem):
        one.work += count * problem.rows * problem.reduction * problem.columns
    else:
        one.work += count * problem.tokens * problem.out_features * problem.in_features
