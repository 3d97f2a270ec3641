"""Decay of pruned weights through their gradients, as in SR-STE and FST."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from semisparse.errors import ConfigError
from semisparse.nn import SemiSparseLinear
from semisparse.recipes.layers import check_optimizer, check_whole, layers_by_weight, refuse_closure, unwrapped


class MaskedDecay:
    """Adds decay * (1 - M) * W to the gradient of each sparse weight, just before the optimizer reads it.

    M is the mask that the layer's forward used: chosen from the weight W at that step, or held by a recipe. Pruned
    weights shrink towards zero, so that masks settle; kept weights are not changed. Only layers that are sparse at that
    step take part.

    SR-STE (arXiv 2102.04010) adds the term in the backward pass; FST (arXiv 2404.01847) adds it to the gradients after
    they were unscaled and clipped. This class uses FST's order for both: an optimizer step hook, which sees accumulated
    and clipped gradients once. So gradient clipping does not include the term, unlike in SR-STE's paper.

    Works with any torch.optim optimizer, parameter groups, gradient accumulation and GradScaler (also with fused
    optimizers, whose gradients are still scaled here). In a step that the scaler skips only gradients change, and they
    are not used.

    The term is computed in the dtype of the weight (N x K), or in fp32 or wider if gradients are still scaled, and is
    added in place in the dtype of the gradient. The mask is exact.

    Args:
        model: A module with SemiSparseLinear layers.
        optimizer: Must hold the weights of all of them that train; may be a wrapper of one.
        decay: The strength, 0 or more. The papers' values lie between 6e-6 and 2e-4, depending on model and optimizer.
            Not multiplied by the learning rate here; the optimizer does that, as with every gradient.

    Raises:
        NoLayerMatchedError: model has no SemiSparseLinear.
        ConfigError: decay or optimizer does not fit. Also raised by optimizer.step(closure), because the gradients do
            not exist yet when the hook runs.
        LayerRefusedError: A weight is sharded or on the meta device.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, decay: float) -> None:
        if isinstance(decay, bool) or not isinstance(decay, (int, float)) or not 0 <= decay < math.inf:
            raise ConfigError(f"decay={decay!r} must be a number, 0 or more")
        self.decay = decay
        self._layers = layers_by_weight(model)
        optimizer = unwrapped(optimizer)
        check_optimizer(optimizer, self._layers)
        check_whole(self._layers)
        self._hook = optimizer.register_step_pre_hook(self._before_step)

    def remove(self) -> None:
        """Take the hook off the optimizer."""
        self._hook.remove()

    @torch.no_grad()
    def _before_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        refuse_closure("MaskedDecay", args, kwargs)
        scale: Tensor | None = getattr(optimizer, "grad_scale", None)
        for layer in self._layers.values():
            if not isinstance(layer, SemiSparseLinear):  # made dense since
                continue
            weight = layer.weight
            if weight.grad is None or not layer.sparse_enabled or self.decay == 0:
                continue
            pruned_away = torch.where(layer.pruned_weight() != 0, 0, weight)
            if scale is None:
                weight.grad.add_(pruned_away, alpha=self.decay)
            else:
                # scale * weight can overflow fp16 (scale >= 2**16); scale * decay * weight cannot. So multiply in fp32.
                factor = scale.to(weight.device, non_blocking=True) * self.decay
                weight.grad.add_(pruned_away.to(torch.promote_types(weight.dtype, torch.float32)) * factor)
