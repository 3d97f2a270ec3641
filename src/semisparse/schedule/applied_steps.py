"""Whether an optimizer step was applied: what a schedule can observe of the steps of a model's optimizers."""

import warnings
from collections.abc import Callable, Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from semisparse.errors import ScheduleError
from semisparse.schedule import optimizer_steps

_SAMPLE = 64
_UNCOUNTED = 64
"""Calls in a row that did not count, without an optimizer step, after which a schedule warns."""
_UNASKED = 64
"""Steps of one optimizer without a call, after which a schedule warns: more than any loop makes between two calls."""


class StepEvidence:
    """Observes the optimizer steps of a model, and tells applied steps from those that a gradient scaler skipped.

    There are three sources; the first that knows decides.

    1. A step hook of all torch optimizers. If an optimizer is not fused, GradScaler leaves a skipped step out, so that
       the hook does not fire; around a fused one it sets optimizer.found_inf, which the hook reads. Both hold for any
       policy of the scale.
    2. If no hook fired (an optimizer that is not torch's, one that moves copies of the weights, or a compiled step):
       whether weights were written to, by their version counters and, until a hook has fired, by a sample of their
       values.
    3. If weights cannot be inspected (shards): a scale that went down.

    Args:
        model: Its optimizers are observed.
        weights: Gives the weights as the layers hold them now.

    Attributes:
        last_scale: The scale at the last step with a scaler; None before.
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
        self._unasked: WeakKeyDictionary[torch.optim.Optimizer, int] = WeakKeyDictionary()
        self._reminded = False
        self._versions, self._samples = self._versions_now(), self._samples_now()
        optimizer_steps.listen(self)

    def was_applied(self, scaler: torch.amp.GradScaler | None, skipped: bool | None) -> bool:
        """Whether a step was applied since the last call. Synchronises with the device if a scaler is enabled.

        Args:
            scaler: As given to SparseSchedule.step.
            skipped: As given to SparseSchedule.step.
        """
        optimizer_steps.deliver_compiled()
        self._asked()
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
            # Written to by something other than the optimizer so far. Under a scaler the hook alone decides.
            applied = not scaled and written
        else:
            applied = self._without_hooks(scaled, scale_fell, self._changed(written))
        self._compiled_step = False
        self._uncounted = 0 if applied else self._uncounted + 1
        if self._uncounted == _UNCOUNTED:
            warnings.warn(
                f"schedule.step() was called {_UNCOUNTED} times in a row without an optimizer step of this model, so "
                "nothing was counted: step the optimizer that holds its parameters, or call schedule.resume_at(n)",
                stacklevel=3,
            )
        return applied

    def _without_hooks(self, scaled: bool, scale_fell: bool, changed: bool | None) -> bool:
        if changed:
            return not scale_fell  # loading a state also writes into weights
        if scaled:
            return changed is None and not scale_fell
        if self._compiled_step:  # of this model or of another one: of another, if values stayed the same
            return changed is None
        # No optimizer was ever seen. Gradients that are still there: a micro-batch of an unfinished step.
        return changed is None or all(parameter.grad is None for parameter in self.model.parameters())

    def begin_anew(self) -> None:
        """Observe from now on, after a state was loaded: its count has what came before, and loading writes weights."""
        self._fired, self._overflows = False, []
        self._asked()
        self._versions, self._samples = self._versions_now(), self._samples_now()

    def saw_a_step(self) -> bool:
        """Whether any optimizer step of the model was seen so far."""
        return self._ever_fired or self._any_compiled

    def trained(self, weight: Tensor) -> bool:
        """Whether an optimizer step used a gradient of weight, or there is one now."""
        return id(weight) in self._trained or _has_gradient(weight)

    def watch_gradients(self, watch: bool) -> None:
        """Set whether steps record which weights have gradients, which synchronises; clears the record."""
        self._watches_gradients, self._trained = watch, set()

    def hear_compiled(self) -> None:
        """Called after a step in compiled code; for which model is not known there."""
        self._compiled_step = self._any_compiled = True

    def hear(self, optimizer: torch.optim.Optimizer) -> None:
        """Called after a step of an optimizer of any model, also one that a fused optimizer skipped."""
        if not self._holds_ours(optimizer):
            return
        self._fired = True
        self._count_unasked(optimizer)
        found_inf = getattr(optimizer, "found_inf", None)
        if isinstance(found_inf, Tensor):
            self._overflows.append(found_inf)
        if self._watches_gradients:
            self._trained |= {id(weight) for weight in self._weights() if _has_gradient(weight)}

    def _asked(self) -> None:
        self._unasked.clear()
        self._reminded = False

    def _count_unasked(self, optimizer: torch.optim.Optimizer) -> None:
        """Warn, once per forgotten stretch, if a loop steps its optimizer and never the schedule."""
        count = self._unasked[optimizer] = self._unasked.get(optimizer, 0) + 1
        if count >= _UNASKED and not self._reminded:
            self._reminded = True
            warnings.warn(
                f"{type(optimizer).__name__} made {_UNASKED} steps of a model with a schedule, without schedule.step() "
                "between them: phases, seeds and weights packed per step stand still; call schedule.step() after each "
                "optimizer.step()",
                stacklevel=2,
            )

    def _holds_ours(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether optimizer holds a parameter of the model; looked up again if its number of parameters changes."""
        held = sum(len(group["params"]) for group in optimizer.param_groups)
        count, known = self._ours.get(optimizer, (-1, False))
        if count != held:
            ids = {id(parameter) for parameter in self.model.parameters()}
            known = any(id(parameter) in ids for group in optimizer.param_groups for parameter in group["params"])
            self._ours[optimizer] = (held, known)
        return known

    def _changed(self, written: bool) -> bool | None:
        """Whether a weight has another version or other values than at the last call; None if that is unknown."""
        before, self._samples = self._samples, self._samples_now()
        if before is None or self._samples is None:
            return None
        return written or any(not torch.equal(old, new) for old, new in zip(before, self._samples, strict=True))

    def _versions_now(self) -> list[tuple[int, int]]:
        """Identity and version of each weight that has one."""
        return [(id(weight), weight._version) for weight in self._weights() if not weight.is_inference()]

    def _samples_now(self) -> list[Tensor] | None:
        """Some values of each weight; None if one has no values of its own, or no version."""
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
            # First call: an applied step increased the growth tracker, unless it made the scale grow.
            fell = state["_growth_tracker"] == 0 and scale < scaler._init_scale
        else:
            fell = scale < self.last_scale
        self.last_scale = scale
        return bool(fell)


def check_step_arguments(scaler: object, skipped: object) -> None:
    """Raise ScheduleError unless at most one argument of SparseSchedule.step is given, and is of its kind."""
    if scaler is not None and not isinstance(scaler, torch.amp.GradScaler):
        raise ScheduleError(
            f"step({scaler!r}): the argument must be a torch.amp.GradScaler; leave it out if there is none, or pass "
            "step(skipped=...) if the framework only tells whether it skipped the step"
        )
    if skipped is not None and not isinstance(skipped, bool):
        raise ScheduleError(f"skipped={skipped!r} must be True, False or None")
    if scaler is not None and skipped is not None:
        raise ScheduleError(f"step(scaler, skipped={skipped}): give one of the two")


def _has_gradient(weight: Tensor) -> bool:
    """Whether weight has a gradient that is not all zeros, as zero_grad(set_to_none=False) leaves one."""
    return weight.grad is not None and bool(weight.grad.any())
