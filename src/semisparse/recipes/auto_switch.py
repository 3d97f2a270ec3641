"""The rule by which STEP decides when to become sparse."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from semisparse.errors import ConfigError, ScheduleError
from semisparse.recipes.layers import refuse_closure
from semisparse.recipes.step_adamw import StepAdamW

_CHECK_EVERY = 10


class AutoSwitch:
    """Measures how much the second moments of the sparse weights change per step (arXiv 2302.01172).

    The change in one step is mean |v_t - v_{t-1}| = (1 - beta2) mean |g^2 - v_{t-1}| over all entries, in fp32. A hook
    computes it before the optimizer steps: StepAdamW is never fused, so gradients are unscaled there, and no hook runs
    in a step that a scaler skips. count() compares the mean over the last 1 / (1 - beta2) applied steps with eps. The
    mean is read (one device sync) every 10 steps once the window is full and the step is within `bounds`.

    A step of the optimizer raises ConfigError if it has a closure, because gradients come too late then. It raises
    ScheduleError if count() was not called since the last one, or if its variance is frozen before the switch or not
    frozen after it, because one of the two states was not loaded.

    Args:
        optimizer: Holds the weights.
        weights: Of the sparse layers.
        bounds: First and last applied step after which the switch may come; the last is 1 or more.

    Attributes:
        switched_at: The applied step after which the switch came, or None.

    Raises:
        ConfigError: Parameter groups with these weights differ in beta2 or eps.
    """

    def __init__(self, optimizer: StepAdamW, weights: Sequence[Tensor], bounds: tuple[int, int]) -> None:
        watched = {id(weight) for weight in weights}
        settings = {
            (float(group["betas"][1]), float(group["eps"]))
            for group in optimizer.param_groups
            if any(id(parameter) in watched for parameter in group["params"])
        }
        if len(settings) > 1:
            raise ConfigError(
                f"optimizer: its groups have (beta2, eps) of {sorted(settings)}; AutoSwitch needs one pair for all "
                "sparse weights"
            )
        self._optimizer, self._weights, self._bounds = optimizer, list(weights), bounds
        ((self._beta2, self._eps),) = settings
        window = max(1, round(1 / (1 - self._beta2)))
        self._changes = torch.zeros(window, dtype=torch.float32, device=self._weights[0].device)
        self._pending: Tensor | None = None
        self._hook: RemovableHandle | None = None
        self.switched_at: int | None = None

    def attach(self) -> None:
        """Add the hook to the optimizer."""
        self._hook = self._optimizer.register_step_pre_hook(self._before_step)

    def detach(self) -> None:
        """Remove the hook."""
        if self._hook is not None:
            self._hook.remove()

    @torch.no_grad()
    def _before_step(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if optimizer.variance_frozen != (self.switched_at is not None):
            raise ScheduleError(
                f"optimizer.variance_frozen={optimizer.variance_frozen}, but the schedule's switched_at is "
                f"{self.switched_at}: load the states of both, and let the schedule freeze the variance"
            )
        if self.switched_at is not None:
            return
        refuse_closure("AutoSwitch", args, kwargs)
        if self._pending is not None:
            raise ScheduleError("optimizer.step() was called twice without schedule.step(): call that after each step")
        total, entries = torch.zeros_like(self._changes[0]), 0
        for weight in self._weights:
            entries += weight.numel()
            if weight.grad is not None:
                before = optimizer.state.get(weight, {}).get("exp_avg_sq")
                change = weight.grad.float().square()
                change = change if before is None else (change - before.float()).abs()
                total = total + change.sum().to(total.device, non_blocking=True)
        self._pending = total * ((1 - self._beta2) / entries)

    def check_seen(self) -> None:
        """Raise ScheduleError unless the optimizer has stepped since the last count."""
        if self._pending is None and self.switched_at is None:
            raise ScheduleError(
                "schedule.step() was called without an optimizer step since the last call: call it once after each, "
                "and pass the GradScaler if there is one"
            )

    def count(self, applied: int) -> bool:
        """Count one applied step that the hook has seen, and freeze the variance if the switch comes now.

        Args:
            applied: Number of applied steps, this one included.

        Returns:
            Whether the switch comes now.
        """
        if self.switched_at is not None or self._pending is None:
            return False
        self._changes[(applied - 1) % len(self._changes)] = self._pending
        self._pending = None
        if not self._due(applied):
            return False
        self.switched_at = applied
        self._optimizer.freeze_variance()
        return True

    def _due(self, applied: int) -> bool:
        low, high = self._bounds
        if applied >= high:
            return True
        if applied < max(low, len(self._changes)) or applied % _CHECK_EVERY:
            return False
        return self._changes.mean().item() < self._eps

    def state_dict(self) -> dict[str, Any]:
        """The last changes, and switched_at."""
        return {"changes": self._changes.clone(), "switched_at": self.switched_at}

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise ScheduleError unless state has the changes of a window of this length, and a switch within bounds."""
        changes, at = state.get("changes"), state.get("switched_at")
        if "switched_at" not in state:
            raise ScheduleError(
                "state has no 'switched_at'; pass what state_dict() of a schedule with AutoSwitch returned"
            )
        ours = self._changes
        if not isinstance(changes, Tensor) or (changes.shape, changes.dtype) != (ours.shape, ours.dtype):
            raise ScheduleError(f"state['changes'] must hold {len(ours)} fp32 numbers; resume with the same beta2")
        if at is not None and (isinstance(at, bool) or not isinstance(at, int) or not 1 <= at <= self._bounds[1]):
            raise ScheduleError(f"state['switched_at']={at!r} must be a step, 1 to {self._bounds[1]}, or None")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a state that check_state has accepted."""
        self._changes.copy_(state["changes"])
        self.switched_at, self._pending = state["switched_at"], None
