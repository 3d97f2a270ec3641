"""StepAdamW saved, copied and misused."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from semisparse.errors import ConfigError
from semisparse.recipes import StepAdamW
from semisparse.testing import assert_bit_equal
from tests.recipes.adamw import SETTINGS, parameters, set_grads
from tests.recipes.training import assert_same


@pytest.mark.parametrize("freeze_at", [1, 3, 5])
@pytest.mark.parametrize("stop", [0, 2, 3, 4, 6])
def test_a_saved_optimizer_goes_on_bit_for_bit(freeze_at: int, stop: int, tmp_path: Any) -> None:
    def train(optimizer: StepAdamW, params: list[nn.Parameter], first: int, last: int) -> None:
        for seed in range(first, last):
            if seed == freeze_at:
                optimizer.freeze_variance()
            set_grads(params, seed)
            optimizer.step()

    whole = parameters()
    train(StepAdamW(whole, **SETTINGS), whole, 0, 8)
    begun = parameters()
    first = StepAdamW(begun, **SETTINGS)
    train(first, begun, 0, stop)
    torch.save([first.state_dict(), [p.detach() for p in begun]], tmp_path / "state.pt")
    state, values = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed = [nn.Parameter(value) for value in values]
    second = StepAdamW(resumed, lr=7.0)
    second.load_state_dict(state)
    assert second.variance_frozen is first.variance_frozen is (stop > freeze_at)
    train(second, resumed, stop, 8)
    for one, other in zip(resumed, whole, strict=True):
        assert_bit_equal(one.detach(), other.detach())


@pytest.mark.parametrize("frozen", [False, True])
def test_copies_and_pickles_keep_everything(frozen: bool) -> None:
    params = parameters()
    optimizer = StepAdamW(params, **SETTINGS)
    set_grads(params, 0)
    optimizer.step()
    if frozen:
        optimizer.freeze_variance()
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert type(other) is StepAdamW and other.variance_frozen is frozen
        copied = other.param_groups[0]["params"]
        set_grads(copied, 1)
        other.step()
        fresh = copy.deepcopy(optimizer)
        set_grads(fresh.param_groups[0]["params"], 1)
        fresh.step()
        for one, two in zip(copied, fresh.param_groups[0]["params"], strict=True):
            assert_bit_equal(one.detach(), two.detach())


def test_a_state_of_plain_adamw_is_taken() -> None:
    theirs, ours = parameters(), parameters()
    plain = torch.optim.AdamW(theirs, **SETTINGS)
    set_grads(theirs, 0)
    plain.step()
    optimizer = StepAdamW(ours, lr=9.0)
    optimizer.load_state_dict(copy.deepcopy(plain.state_dict()))
    assert optimizer.variance_frozen is False
    for one, other in zip(ours, theirs, strict=True):
        one.data.copy_(other.data)
    for params, used in ((ours, optimizer), (theirs, plain)):
        set_grads(params, 1)
        used.step()
    for one, other in zip(ours, theirs, strict=True):
        assert_bit_equal(one.detach(), other.detach())


REFUSED = ("amsgrad", "maximize", "capturable", "differentiable", "fused")


@pytest.mark.parametrize("name", REFUSED)
def test_variants_are_refused_wherever_they_come_from(name: str) -> None:
    params = parameters()
    message = f"{name}=True is not supported by StepAdamW; leave it out"
    with pytest.raises(ConfigError, match=message):
        StepAdamW(params, **{name: True})
    optimizer = StepAdamW(params[:1])
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ConfigError, match=message):
        optimizer.add_param_group({"params": params[1:], name: True})
    state = copy.deepcopy(before)
    state["param_groups"][0][name] = True
    with pytest.raises(ConfigError, match=message):
        optimizer.load_state_dict(state)
    assert_same(optimizer.state_dict(), before)
    optimizer.add_param_group({"params": params[1:], name: False})
    assert len(optimizer.param_groups) == 2


def test_a_parameter_without_variance_is_refused_before_anything_moves() -> None:
    params = parameters()
    optimizer = StepAdamW([{"params": params[:1]}, {"params": params[1:]}], **SETTINGS)
    set_grads(params[:2], 0)
    optimizer.step()
    optimizer.freeze_variance()
    before, values = copy.deepcopy(optimizer.state_dict()), [p.detach().clone() for p in params]
    set_grads(params, 1)
    with pytest.raises(ConfigError, match=r"param_groups\[1\]: a parameter of shape \(2, 2, 2\) gets its first grad"):
        optimizer.step()
    with pytest.raises(ConfigError, match="the variance is frozen and new parameters have none; use a second"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    assert_same(optimizer.state_dict(), before)
    for p, old in zip(params, values, strict=True):
        assert_bit_equal(p.detach(), old)


def test_a_frozen_step_refuses_to_be_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    params = parameters()
    optimizer = StepAdamW(params)
    set_grads(params, 0)
    optimizer.step()
    optimizer.freeze_variance()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(ConfigError, match="leave its step out of CUDA graphs"):
        optimizer.step()
