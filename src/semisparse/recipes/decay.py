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

    M is the mask that the layer's forward used: of the weight W as it is at that step, or frozen by a recipe. Pruned
    weights shrink towards zero, so that masks settle; kept ones are left alone. Only layers that are sparse at that
    moment take part.

    SR-STE (arXiv 2102.04010) adds the term in the backward pass; FST (arXiv 2404.01847) adds it to the gradients after
    they were unscaled and clipped. This is FST's order, for both: an optimizer step hook, which sees accumulated and
    clipped gradients once. So gradient clipping does not see the term, and SR-STE differs from its paper in that.

    Any torch.optim optimizer, with parameter groups, GradScaler (fused optimizers too, whose gradients are still scaled
    here) and gradient accumulation. In a step that the scaler skips only gradients change, which nobody reads.

    The term is computed in the dtype of the weight (N x K), in fp32 or wider where gradients are still scaled, and
    added in place, in the gradient's. The mask is exact.

    model: holds SemiSparseLinear layers. optimizer: must hold the weights of all of them that train; a wrapper of one
    will do. decay: the strength, 0 or more; the papers' values lie between 6e-6 and 2e-4, by model and optimizer. It is
    not multiplied by the learning rate here; the optimizer does that, as with every gradient.
    Raises NoLayerMatchedError, ConfigError, LayerRefusedError for a sharded or meta weight; ConfigError from
    optimizer.step(closure), whose gradients do not exist yet when the hook runs.
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
            if not isinstance(layer, SemiSparseLinear):  # it was densified since
                continue
            weight = layer.weight
            if weight.grad is None or not layer.sparse_enabled or self.decay == 0:
                continue
            pruned_away = torch.where(layer.pruned_weight() != 0, 0, weight)
            if scale is None:
                weight.grad.add_(pruned_away, alpha=self.decay)
            else:
                # A scale of 2**16 and more times a weight is no fp16 number, with the decay it is a small one.
                factor = scale.to(weight.device, non_blocking=True) * self.decay
                weight.grad.add_(pruned_away.to(torch.promote_types(weight.dtype, torch.float32)) * factor)
