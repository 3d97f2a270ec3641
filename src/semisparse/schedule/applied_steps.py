"""Whether the optimizer step was applied: what a schedule can see of the steps of a model's optimizers."""

import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from semisparse import calls

_SAMPLE = 64
_UNCOUNTED = 64
"""Calls in a row that did not count, with no optimizer in sight, after which a schedule says so."""


class StepEvidence:
    """Sees each optimizer step of a model, and tells an applied one from one that a gradient scaler skipped.

    Three sources, the first that knows decides. (1) A step hook of all torch optimizers: of an optimizer that is not
    fused, GradScaler leaves a skipped step out, so that the hook does not fire; around a fused one it sets
    optimizer.found_inf, which the hook reads. Both hold for any policy of the scale. (2) Where no hook fired (an
    optimizer that is not torch's, one that moves copies of the weights, or a compiled step): whether weights were
    written to, by their versions and, until a hook has ever fired, a sample of their values. (3) Where weights cannot
    be asked (shards): a scale that went down.

    weights: gives the weights as the layers hold them now.
    """

    def __init__(self, model: nn.Module, weights: Callable[[], Sequence[Tensor]]) -> None:
        self.model, self._weights = model, weights
        self.last_scale: float | None = None
        self._fired = self._ever_fired = self._watches_gradients = False
        self._overflows: list[Tensor] = []
        self._trained: set[int] = set()
        self._ours: WeakKeyDictionary[torch.optim.Optimizer, tuple[int, bool]] = WeakKeyDictionary()
        self._compiled_step = self._any_compiled = False
        self._uncounted = 0
        self._versions, self._samples = self._versions_now(), self._samples_now()
        _listeners.add(self)
        _hook_once()

    def was_applied(self, scaler: torch.amp.GradScaler | None, skipped: bool | None) -> bool:
        """Whether a step was applied since the last call. Waits for the device where a scaler is at work.

        scaler, skipped: what the caller was given by its host, None where nothing.
        """
        _hear_compiled()
        fired, overflows = self._fired, self._overflows
        self._fired, self._overflows = False, []
        self._ever_fired = self._ever_fired or fired
        scale_fell = self._scale_fell(scaler)
        before, self._versions = self._versions, self._versions_now()
        written = before != self._versions
        if skipped:
            self._samples = self._samples if self._ever_fired else self._samples_now()
            return False
        if fired:
            self._uncounted = 0
            return not any(bool(found.item()) for found in overflows)
        scaled = scaler is not None and scaler.is_enabled()
        if self._ever_fired:
            # Written to by something else than the optimizer so far. Under a scaler the hook alone decides.
            applied = not scaled and written
        else:
            applied = self._without_hooks(scaled, scale_fell, self._changed(written))
        self._compiled_step = False
        self._uncounted = 0 if applied else self._uncounted + 1
        if self._uncounted == _UNCOUNTED:
            warnings.warn(
                f"schedule.step() was called {_UNCOUNTED} times in a row without an optimizer step of this model in "
                "sight, so nothing was counted: step the optimizer that holds its parameters, or say "
                "schedule.resume_at(n)",
                stacklevel=4,
            )
        return applied

    def _without_hooks(self, scaled: bool, scale_fell: bool, changed: bool | None) -> bool:
        if changed:
            return not scale_fell  # a state that was loaded writes into weights, too
        if scaled:
            return changed is None and not scale_fell
        if self._compiled_step:  # of this model or of another one: where values stay the same, of another
            return changed is None
        # No optimizer was ever seen. Gradients that nobody has used yet: a micro-batch of an unfinished step.
        return changed is None or all(parameter.grad is None for parameter in self.model.parameters())

    def saw_a_step(self) -> bool:
        """Whether any optimizer step of the model was seen so far."""
        return self._ever_fired or self._any_compiled

    def trained(self, weight: Tensor) -> bool:
        """Whether an optimizer step met a gradient of weight, or one is there now."""
        return id(weight) in self._trained or _has_gradient(weight)

    def watch_gradients(self, watch: bool) -> None:
        """Whether steps note which weights have gradients, which waits for the device; forgets what was noted."""
        self._watches_gradients, self._trained = watch, set()

    def hear_compiled(self) -> None:
        """An optimizer stepped in compiled code; of which model cannot be told there."""
        self._compiled_step = self._any_compiled = True

    def hear(self, optimizer: torch.optim.Optimizer) -> None:
        """An optimizer, of whatever model, has stepped or would have without an overflow."""
        if not self._holds_ours(optimizer):
            return
        self._fired = True
        found_inf = getattr(optimizer, "found_inf", None)
        if isinstance(found_inf, Tensor):
            self._overflows.append(found_inf)
        if self._watches_gradients:
            self._trained |= {id(weight) for weight in self._weights() if _has_gradient(weight)}

    def _holds_ours(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether optimizer moves a parameter of the model; asked once for each number of parameters that it holds."""
        held = sum(len(group["params"]) for group in optimizer.param_groups)
        count, known = self._ours.get(optimizer, (-1, False))
        if count != held:
            ids = {id(parameter) for parameter in self.model.parameters()}
            known = any(id(parameter) in ids for group in optimizer.param_groups for parameter in group["params"])
            self._ours[optimizer] = (held, known)
        return known

    def _changed(self, written: bool) -> bool | None:
        """Whether a weight has another version or other values than at the last call; None where it cannot be told."""
        before, self._samples = self._samples, self._samples_now()
        if before is None or self._samples is None:
            return None
        return written or any(not torch.equal(old, new) for old, new in zip(before, self._samples, strict=True))

    def _versions_now(self) -> list[tuple[int, int]]:
        """Identity and version of each weight that has one."""
        return [(id(weight), weight._version) for weight in self._weights() if not weight.is_inference()]

    def _samples_now(self) -> list[Tensor] | None:
        """Some values of each weight; None where one has none of its own, or no version."""
        weights = self._weights()
        if any(hasattr(w, "full_tensor") or w.is_inference() or w.is_meta or w.numel() == 0 for w in weights):
            return None
        return [w.detach().reshape(-1)[:: max(1, w.numel() // _SAMPLE)].clone() for w in weights]

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


class _CompiledSteps:
    """Whether a compiled optimizer step ran. A plain attribute, because only a write to one can be traced."""

    fired = False


# One hook for the whole process, from the first schedule on: hooks must not come and go while torch runs them.
_listeners: WeakSet[StepEvidence] = WeakSet()
_compiled = _CompiledSteps()


@cache
def _hook_once() -> None:
    register_optimizer_step_post_hook(_after_step)


def _hear_compiled() -> None:
    if _compiled.fired:
        _compiled.fired = False
        for listener in list(_listeners):
            listener.hear_compiled()


def _after_step(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if torch.compiler.is_compiling():
        _compiled.fired = True
        return
    if not calls.paused():
        for listener in list(_listeners):
            listener.hear(optimizer)


def _has_gradient(weight: Tensor) -> bool:
    """Whether weight has a gradient that is not all zeros, as zero_grad(set_to_none=False) leaves one."""
    return weight.grad is not None and bool(weight.grad.any())
