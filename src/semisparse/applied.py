"""Whether the optimizer step was applied: what a schedule can see of the steps of a model's optimizers."""

from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary, finalize

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook


class _Record:
    """What the hook has seen since the last look. Plain attributes, so that torch.compile can trace a write to one."""

    def __init__(self, model: nn.Module, weights: tuple[Tensor, ...]) -> None:
        self.model, self.weights = model, weights
        self.fired = False
        self.overflows: list[Tensor] = []
        self.trained: set[int] = set()
        self.watches_gradients = False
        self.ours: WeakKeyDictionary[torch.optim.Optimizer, bool] = WeakKeyDictionary()

    def holds_ours(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether optimizer moves a parameter of the model; asked of each optimizer once."""
        known = self.ours.get(optimizer)
        if known is None:
            ids = {id(parameter) for parameter in self.model.parameters()}
            known = any(id(parameter) in ids for group in optimizer.param_groups for parameter in group["params"])
            self.ours[optimizer] = known
        return known


class StepEvidence:
    """Sees each optimizer step of a model, and tells an applied one from one that a gradient scaler skipped.

    Three sources, the first that knows decides. (1) A step hook of all torch optimizers: of an optimizer that is not
    fused, GradScaler leaves a skipped step out, so that the hook does not fire; around a fused one it sets
    optimizer.found_inf, which the hook reads. Both hold for any policy of the scale. (2) Where no hook ever fired (an
    optimizer that is not torch's): whether a weight was written to. (3) Where weights cannot be asked (shards): a scale
    that went down.
    """

    def __init__(self, model: nn.Module, weights: Iterable[Tensor]) -> None:
        record = self._record = _Record(model, tuple(weights))
        self._ever_fired = False
        self._versions = self._versions_now()
        self.last_scale: float | None = None

        def fired(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if torch.compiler.is_compiling():  # a compiled step; only the write can be traced
                record.fired = True
                return
            if not record.holds_ours(optimizer):
                return
            record.fired = True
            found_inf = getattr(optimizer, "found_inf", None)
            if isinstance(found_inf, Tensor):
                record.overflows.append(found_inf)
            if record.watches_gradients:
                record.trained |= {id(weight) for weight in record.weights if _has_gradient(weight)}

        finalize(self, register_optimizer_step_post_hook(fired).remove)

    def was_applied(self, scaler: torch.amp.GradScaler | None, skipped: bool | None) -> bool:
        """Whether a step was applied since the last call. Waits for the device where a scaler is at work.

        scaler, skipped: what the caller was given by its host, None where nothing.
        """
        fired, overflows = self._record.fired, self._record.overflows
        self._record.fired, self._record.overflows = False, []
        self._ever_fired = self._ever_fired or fired
        before, self._versions = self._versions, self._versions_now()
        scale_fell = self._scale_fell(scaler)
        if skipped:
            return False
        if fired:
            return not any(bool(found.item()) for found in overflows)
        if self._ever_fired:
            return False
        if before is not None and self._versions is not None and before != self._versions:
            return not scale_fell  # a state that was loaded writes into weights, too
        if scaler is not None and scaler.is_enabled():
            return self._versions is None and not scale_fell
        # No optimizer was ever seen. Gradients that nobody has used yet: a micro-batch of an unfinished step.
        return all(weight.grad is None for weight in self._record.weights) or self._versions is None

    def trained(self, weight: Tensor) -> bool:
        """Whether an optimizer step met a gradient of weight, or one is there now."""
        return id(weight) in self._record.trained or _has_gradient(weight)

    def watch_gradients(self, watch: bool) -> None:
        """Whether steps note which weights have gradients, which waits for the device; forgets what was noted."""
        self._record.watches_gradients, self._record.trained = watch, set()

    def _versions_now(self) -> tuple[int, ...] | None:
        """A number for each weight that every write into it raises; None where a weight has none of its own."""
        if any(hasattr(weight, "full_tensor") or weight.is_inference() for weight in self._record.weights):
            return None
        return tuple(weight._version for weight in self._record.weights)

    def _scale_fell(self, scaler: torch.amp.GradScaler | None) -> bool:
        if scaler is None or not scaler.is_enabled():
            return False
        state = scaler.state_dict()
        scale = float(state["scale"])
        if self.last_scale is None:
            # First sight: an applied step left a count behind, unless it made the scale grow.
            fell = state["_growth_tracker"] == 0 and scale < scaler._init_scale
        else:
            fell = scale < self.last_scale
        self.last_scale = scale
        return bool(fell)


def _has_gradient(weight: Tensor) -> bool:
    """Whether weight has a gradient that is not all zeros, as zero_grad(set_to_none=False) leaves one."""
    return weight.grad is not None and bool(weight.grad.any())
