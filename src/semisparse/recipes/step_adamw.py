"""STEP's optimizer and the rule by which it finds the moment to go sparse."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from semisparse.errors import ConfigError, ScheduleError
from semisparse.nn import SemiSparseLinear

_REFUSED = ("amsgrad", "maximize", "capturable", "differentiable", "fused")
_CHECK_EVERY = 10


class StepAdamW(torch.optim.AdamW):
    """AdamW whose second moments can be frozen, as STEP does for its sparse phase (arXiv 2302.01172).

    Until freeze_variance() it is AdamW. From then on exp_avg_sq stays v*, and a step is

        p = p * (1 - lr * weight_decay);   m = beta1 * m + (1 - beta1) * g
        p = p - lr / (1 - beta1^t) * m / (sqrt(v*) + eps^(3/4))

    with no bias correction of v*: the form of the authors' released code, not checked against the paper's text.
    A parameter that meets its first gradient when frozen has v* = 0. State and arguments are AdamW's (params, lr,
    betas, eps, weight_decay, foreach); param_groups have "variance_frozen" besides, which state_dict saves.
    Raises ConfigError for amsgrad, maximize, capturable, differentiable and fused.
    """

    def __init__(self, params: Any, lr: float = 1e-3, **settings: Any) -> None:
        super().__init__(params, lr=lr, **settings)
        for group in self.param_groups:
            self._check(group)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch.optim.Optimizer; a new group's variance is frozen if that of the others is."""
        frozen = any(group["variance_frozen"] for group in self.param_groups)
        super().add_param_group({"variance_frozen": frozen, **param_group})
        self._check(self.param_groups[-1])

    @staticmethod
    def _check(group: dict[str, Any]) -> None:
        for name in _REFUSED:
            if group.get(name):
                raise ConfigError(f"{name}={group[name]!r}: StepAdamW has no such variant; leave it out")

    @property
    def variance_frozen(self) -> bool:
        """Whether freeze_variance was called."""
        return all(group["variance_frozen"] for group in self.param_groups)

    def freeze_variance(self) -> None:
        """Keep all second moments as they are from now on."""
        for group in self.param_groups:
            group["variance_frozen"] = True

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step; returns the closure's loss. Plain AdamW until the variance is frozen."""
        if not self.variance_frozen:
            return super().step(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._step_frozen(group)
        return loss

    def _step_frozen(self, group: dict[str, Any]) -> None:
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        by_age: dict[int, list[Tensor]] = {}
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["step"] = torch.tensor(0.0)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
            state["step"] += 1
            by_age.setdefault(int(state["step"]), []).append(parameter)
        for age, members in by_age.items():
            momenta = [self.state[p]["exp_avg"] for p in members]
            torch._foreach_lerp_(momenta, [p.grad for p in members if p.grad is not None], 1 - group["betas"][0])
            torch._foreach_mul_(members, 1 - group["lr"] * group["weight_decay"])
            scales = torch._foreach_sqrt([self.state[p]["exp_avg_sq"] for p in members])
            torch._foreach_add_(scales, group["eps"] ** 0.75)
            torch._foreach_addcdiv_(members, momenta, scales, -group["lr"] / (1 - group["betas"][0] ** age))


class AutoSwitch:
    """Watches how much the second moments of the sparse weights change from step to step (arXiv 2302.01172).

    The change of one step is mean |v_t - v_{t-1}| = (1 - beta2) mean |g^2 - v_{t-1}| over all entries, taken by a hook
    before the optimizer steps. due() compares its mean over the last 1 / (1 - beta2) applied steps with eps.
    """

    def __init__(self, optimizer: StepAdamW, layers: Iterable[SemiSparseLinear], bounds: tuple[int, int]) -> None:
        first = optimizer.param_groups[0]
        for group in optimizer.param_groups:
            if (group["betas"][1], group["eps"]) != (first["betas"][1], first["eps"]):
                raise ConfigError("optimizer: AutoSwitch needs the same beta2 and eps in all parameter groups")
        self._optimizer, self._weights, self._bounds = optimizer, [layer.weight for layer in layers], bounds
        self._beta2, self._eps = first["betas"][1], first["eps"]
        window = max(1, round(1 / (1 - self._beta2)))
        self._changes = torch.zeros(window, dtype=torch.float32, device=self._weights[0].device)
        self._pending: Tensor | None = None
        self._hook = optimizer.register_step_pre_hook(self._before_step)

    @torch.no_grad()
    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        total, entries = torch.zeros_like(self._changes[0]), 0
        for weight in self._weights:
            entries += weight.numel()
            if weight.grad is not None:
                before = optimizer.state[weight].get("exp_avg_sq") if weight in optimizer.state else None
                change = weight.grad.float().square()
                change = change if before is None else (change - before.float()).abs()
                total = total + change.sum().to(total.device, non_blocking=True)
        self._pending = total * ((1 - self._beta2) / entries)

    def due(self, applied: int) -> bool:
        """Count the applied-th step, which the hook has seen; whether the dense phase should end with it."""
        if self._pending is not None:
            self._changes[(applied - 1) % len(self._changes)] = self._pending
        low, high = self._bounds
        if applied >= high:
            return True
        if applied < max(low, len(self._changes)) or applied % _CHECK_EVERY:
            return False
        return self._changes.mean().item() < self._eps

    def finish(self) -> None:
        """Stop watching."""
        self._hook.remove()

    def state_dict(self) -> dict[str, Any]:
        """The last changes."""
        return {"changes": self._changes.clone()}

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise ScheduleError unless state holds the changes of an equal window."""
        changes = state.get("changes")
        if not isinstance(changes, Tensor) or changes.shape != self._changes.shape:
            raise ScheduleError(f"state['changes'] must hold {len(self._changes)} numbers; resume with the same beta2")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state that check_state has passed."""
        self._changes.copy_(state["changes"])
