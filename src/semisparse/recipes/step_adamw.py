"""STEP's optimizer: AdamW whose second moments can be frozen."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from semisparse.errors import ConfigError

_REFUSED = ("amsgrad", "maximize", "capturable", "differentiable", "fused")
# Without the wrapper that runs step hooks: torch puts one around the step of every optimizer class once it has been
# instantiated, so AdamW.step called from StepAdamW.step would run all hooks a second time.
_PLAIN_STEP: Callable[..., Any] = inspect.unwrap(torch.optim.AdamW.step)


class StepAdamW(torch.optim.AdamW):
    """AdamW whose second moments can be frozen, as STEP does for its sparse phase (arXiv 2302.01172).

    Until freeze_variance() it is AdamW, bit for bit. From then on exp_avg_sq stays v*, and a step is

        p = p * (1 - lr * weight_decay);   m = beta1 * m + (1 - beta1) * g
        p = p - lr / (1 - beta1^t) * m / (sqrt(v*) + eps^(3/4))

    without bias correction of v*: the form of the authors' released code, not checked against the paper's text. An
    entry whose gradient was always 0 until then has v* = 0, and moves by m / eps^(3/4) from its first one on.

    State, dtypes and arguments are AdamW's (params, lr, betas, eps, weight_decay, foreach); param_groups also have
    "variance_frozen", which state_dict saves. Steps do not synchronise with the device, unless lr is a tensor on it.

    Raises:
        ConfigError: For amsgrad, maximize, capturable, differentiable and fused, also if a state with one of them is
            loaded. While the variance is frozen: for a parameter that gets its first gradient, for a new group, and in
            a CUDA graph.
    """

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch.optim.Optimizer, if the variance is not frozen: later parameters would have none."""
        if any(group["variance_frozen"] for group in self.param_groups):
            raise ConfigError(
                "param_group: the variance is frozen and new parameters have none; use a second optimizer"
            )
        if isinstance(param_group, Mapping):
            _check({**self.defaults, **param_group})
            param_group = {**param_group, "variance_frozen": False}
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch.optim.Optimizer, for a state of StepAdamW or of an AdamW with settings that StepAdamW supports."""
        for group in state_dict["param_groups"]:
            _check(group)
        super().load_state_dict(state_dict)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("variance_frozen", False)
        for values in self.state.values():
            if isinstance(values.get("step"), Tensor):  # read at every step; torch.load may have put it on a device
                values["step"] = values["step"].cpu()

    @property
    def variance_frozen(self) -> bool:
        """Whether freeze_variance was called."""
        return all(group["variance_frozen"] for group in self.param_groups)

    def freeze_variance(self) -> None:
        """Keep all second moments fixed from now on."""
        for group in self.param_groups:
            group["variance_frozen"] = True

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step: plain AdamW until the variance is frozen.

        Args:
            closure: As for torch.optim.AdamW.

        Returns:
            The loss that the closure returned, or None.
        """
        if not self.variance_frozen:
            return _PLAIN_STEP(self, closure)
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            raise ConfigError("StepAdamW reads its step count on the host: leave its step out of CUDA graphs")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moving = [[p for p in group["params"] if p.grad is not None] for group in self.param_groups]
        for index, parameters in enumerate(moving):
            for parameter in parameters:
                if not self.state.get(parameter):
                    raise ConfigError(
                        f"param_groups[{index}]: a parameter of shape {tuple(parameter.shape)} gets its first "
                        "gradient after the variance was frozen; let it take part in the dense phase, or give it "
                        "another optimizer"
                    )
        for group, parameters in zip(self.param_groups, moving, strict=True):
            self._step_frozen(group, parameters)
        return loss

    def _step_frozen(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        lr, beta1 = float(group["lr"]), float(group["betas"][0])
        by_age: dict[int, list[Tensor]] = {}
        for parameter in parameters:
            steps = self.state[parameter]["step"]
            steps += 1
            by_age.setdefault(int(steps), []).append(parameter)
        for age, members in by_age.items():
            values = _real(members)
            momenta = _real(self.state[p]["exp_avg"] for p in members)
            torch._foreach_lerp_(momenta, _real(p.grad for p in members), 1 - beta1)
            torch._foreach_mul_(values, 1 - lr * group["weight_decay"])
            scales = torch._foreach_sqrt(_real(self.state[p]["exp_avg_sq"] for p in members))
            torch._foreach_add_(scales, group["eps"] ** 0.75)
            torch._foreach_addcdiv_(values, momenta, scales, -lr / (1 - beta1**age))


def _check(group: Mapping[str, Any]) -> None:
    for name in _REFUSED:
        if group.get(name):
            raise ConfigError(f"{name}={group[name]!r} is not supported by StepAdamW; leave it out")


def _real(tensors: Any) -> list[Tensor]:
    """Complex tensors as pairs of real ones, as AdamW treats them."""
    return [torch.view_as_real(tensor) if tensor.is_complex() else tensor for tensor in tensors]
