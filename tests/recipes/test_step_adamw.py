"""StepAdamW: torch's AdamW until it is frozen, then the formula, written out here."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from semisparse.recipes import StepAdamW
from semisparse.testing import assert_as_good_as_torch, assert_bit_equal, assert_same_up_to_rounding
from tests.recipes.adamw import SETTINGS, parameters, set_grads
from tests.recipes.training import assert_same


def frozen_by_hand(
    start: dict[str, Tensor], grads: list[Tensor], dtype: torch.dtype, age: int, settings: dict[str, Any]
) -> Tensor:
    """The parameter after len(grads) frozen steps, in dtype; start: what it and its moments were, after age steps."""
    lr, (beta1, _), eps, decay = (settings[key] for key in ("lr", "betas", "eps", "weight_decay"))
    p, m, v = (start[name].to(dtype) for name in ("p", "exp_avg", "exp_avg_sq"))
    for t, grad in enumerate(grads, age + 1):
        p = p * (1 - lr * decay)
        m = beta1 * m + (1 - beta1) * grad.to(dtype)
        p = p - lr / (1 - beta1**t) * m / (v.sqrt() + eps**0.75)
    return p


OPERATIONS = 12
"""Of one step, in a row, that round: 3 for the mean, 5 for the variance and its root, 4 for decay, quotient and sum."""

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "one by one": {"foreach": False},
    "all at once": {"foreach": True},
    "lr is a tensor": {"lr": torch.tensor(0.03)},
    "no decay": {"weight_decay": 0.0},
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("variant", VARIANTS)
def test_until_it_is_frozen_it_is_adamw_bit_for_bit(variant: str, dtype: torch.dtype) -> None:
    ours, theirs = parameters(dtype), parameters(dtype)
    settings = {**SETTINGS, **VARIANTS[variant]}
    optimizers = StepAdamW(ours, **settings), torch.optim.AdamW(theirs, **settings)
    for seed in range(6):
        for params, optimizer in zip((ours, theirs), optimizers, strict=True):
            set_grads(params, seed)
            if seed == 2:
                params[1].grad = None
            optimizer.step()
        for one, other in zip(ours, theirs, strict=True):
            assert torch.equal(one, other)
    assert_same(optimizers[0].state_dict()["state"], optimizers[1].state_dict()["state"])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_frozen_it_is_the_formula(variant: str, dtype: torch.dtype) -> None:
    params = parameters(dtype)
    settings = {**SETTINGS, **VARIANTS[variant]}
    optimizer = StepAdamW(params, **settings)
    for seed in range(4):
        set_grads(params, seed)
        optimizer.step()
    optimizer.freeze_variance()
    starts = [{"p": p.detach().clone(), **copy.deepcopy(optimizer.state[p])} for p in params]
    grads: list[list[Tensor]] = [[] for _ in params]
    for seed in range(4, 9):
        set_grads(params, seed)
        for parameter, seen in zip(params, grads, strict=True):
            seen.append(parameter.grad.clone())
        optimizer.step()
    settings["lr"] = float(settings["lr"])
    for parameter, start, seen in zip(params, starts, grads, strict=True):
        exact = frozen_by_hand(start, seen, torch.float64, 4, settings)
        if dtype == torch.float64:
            assert_same_up_to_rounding(parameter.detach(), exact, operations=OPERATIONS * len(seen))
        else:
            assert_as_good_as_torch(parameter.detach(), frozen_by_hand(start, seen, dtype, 4, settings), exact)


def test_a_complex_parameter_is_a_pair_of_real_ones_frozen_too() -> None:
    torch.manual_seed(0)
    whole = nn.Parameter(torch.randn(3, 2, dtype=torch.complex64))
    pair = nn.Parameter(torch.view_as_real(whole.detach()).clone())
    optimizers = [StepAdamW([p], **SETTINGS) for p in (whole, pair)]
    for seed in range(5):
        whole.grad = torch.randn(3, 2, dtype=torch.complex64, generator=torch.Generator().manual_seed(seed))
        pair.grad = torch.view_as_real(whole.grad).clone()
        for optimizer in optimizers:
            optimizer.step()
            if seed == 2:
                optimizer.freeze_variance()
    torch.testing.assert_close(torch.view_as_real(whole.detach()), pair.detach())


def test_frozen_variances_stay_and_all_else_goes_on() -> None:
    params = parameters()
    optimizer = StepAdamW(params, **SETTINGS)
    for seed in range(4):
        set_grads(params, seed)
        optimizer.step()
    optimizer.freeze_variance()
    before = [optimizer.state[p]["exp_avg_sq"].clone() for p in params]
    set_grads(params, 9)
    params[0].grad = None
    still = params[0].detach().clone()
    optimizer.step()
    for parameter, variance in zip(params, before, strict=True):
        assert_bit_equal(optimizer.state[parameter]["exp_avg_sq"], variance)
    assert [int(optimizer.state[p]["step"]) for p in params] == [4, 5, 5]
    assert_bit_equal(params[0].detach(), still)
    optimizer.zero_grad()
    optimizer.step()  # no gradient at all
    assert [int(optimizer.state[p]["step"]) for p in params] == [4, 5, 5]


@pytest.mark.parametrize("frozen", [False, True])
def test_groups_have_their_own_settings_and_a_scheduler_moves_the_rate(frozen: bool) -> None:
    params = parameters(torch.float64)
    groups = [{"params": params[:1]}, {"params": params[1:], "lr": 0.5, "betas": (0.5, 0.95), "weight_decay": 0.0}]
    optimizer = StepAdamW(groups, **SETTINGS)
    rates = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    set_grads(params, 0)
    optimizer.step()
    rates.step()
    if frozen:
        optimizer.freeze_variance()
    start = [p.detach().clone() for p in params]
    values = [{key: value.clone() for key, value in optimizer.state[p].items()} for p in params]
    set_grads(params, 1)
    optimizer.step()
    for p, old, state, lr, beta1, decay in zip(
        params, start, values, (0.015, 0.25, 0.25), (0.8, 0.5, 0.5), (0.1, 0, 0), strict=True
    ):
        m, v = beta1 * state["exp_avg"] + (1 - beta1) * p.grad, state["exp_avg_sq"]
        if frozen:
            scale = v.sqrt() + 1e-6**0.75
        else:
            scale = ((0.95 * v + 0.05 * p.grad**2) / (1 - 0.95**2)).sqrt() + 1e-6
        wanted = old * (1 - lr * decay) - lr / (1 - beta1**2) * m / scale
        assert_same_up_to_rounding(p.detach(), wanted, operations=OPERATIONS)


@pytest.mark.parametrize("frozen", [False, True])
def test_hooks_run_once_a_step_also_when_an_adamw_was_built_before(frozen: bool) -> None:
    """torch wraps AdamW.step in the hooks as soon as there is an AdamW; StepAdamW.step must not go through that."""
    torch.optim.AdamW(parameters())
    assert torch.optim.AdamW.step.hooked
    params = parameters()
    optimizer, calls = StepAdamW(params), []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    set_grads(params, 0)
    optimizer.step()
    if frozen:
        optimizer.freeze_variance()
    optimizer.step()
    assert calls == ["before", "after"] * 2


@pytest.mark.parametrize("frozen", [False, True])
def test_a_closure_is_run_with_gradients_and_its_loss_returned(frozen: bool) -> None:
    params = parameters()
    optimizer = StepAdamW(params)
    set_grads(params, 0)
    optimizer.step()
    if frozen:
        optimizer.freeze_variance()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = sum(p.square().sum() for p in params)
        loss.backward()
        return loss

    before = [p.detach().clone() for p in params]
    loss = optimizer.step(closure)
    assert loss == sum(p.square().sum() for p in before)
    assert all(not torch.equal(p, old) for p, old in zip(params, before, strict=True))


@pytest.mark.parametrize("frozen", [False, True])
def test_a_scaler_unscales_first_and_skips(frozen: bool) -> None:
    finals = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=2)):
        params = parameters()
        optimizer = StepAdamW(params, **SETTINGS)
        for seed in range(6):
            if seed == 2 and frozen:
                optimizer.freeze_variance()
            set_grads(params, seed)
            if scaler is None:
                optimizer.step()
                continue
            scaler.scale(torch.zeros(()))  # what every step of a scaler begins with
            for p in params:
                p.grad *= scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            if seed == 3:
                state = copy.deepcopy(optimizer.state_dict())
                set_grads(params, 99)
                params[1].grad[0] = float("nan")
                scaler.step(optimizer)
                scaler.update()
                assert_same(optimizer.state_dict(), state)
        finals.append([p.detach() for p in params])
    for one, other in zip(*finals, strict=True):
        assert_bit_equal(one, other)  # scales are powers of two


class Reads(TorchDispatchMode):
    """The tensors whose value the host asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            self.tensors.append(args[0])
        return func(*args, **(kwargs or {}))


def test_a_frozen_step_reads_nothing_but_step_counts_on_the_host() -> None:
    params = parameters()
    optimizer = StepAdamW(params, **SETTINGS)
    set_grads(params, 0)
    optimizer.step()
    optimizer.freeze_variance()
    with Reads() as reads:
        optimizer.step()
    counts = {optimizer.state[p]["step"].data_ptr() for p in params}
    assert reads.tensors and all(tensor.data_ptr() in counts for tensor in reads.tensors)
    assert all(optimizer.state[p]["step"].device.type == "cpu" for p in params)
