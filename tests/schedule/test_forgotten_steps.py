"""A loop that steps its optimizer and never its schedule."""

import warnings

import pytest
import torch
from torch import nn

from semisparse import SparseSchedule
from tests.schedule.test_applied_steps import net


def test_a_loop_that_forgets_the_schedule_is_told_once_and_one_that_does_not_is_never() -> None:
    model, x = net(), torch.randn(4, 16)
    schedule = SparseSchedule.sparse_then_dense(model, 500)
    optimizers = [torch.optim.SGD([parameter], lr=0.1) for parameter in model.parameters()]  # two steps per iteration

    def iterate(count: int) -> None:
        for _ in range(count):
            model(x).sum().backward()
            for optimizer in optimizers:
                optimizer.step()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(10):
            iterate(63)  # as many between two calls as nobody makes
            schedule.step()
        iterate(63)
    with pytest.warns(UserWarning, match=r"SGD made 64 steps .* without schedule\.step\(\)") as told:
        iterate(100)
    assert len(told) == 1


def test_steps_of_another_models_optimizer_remind_nobody() -> None:
    schedule, other = SparseSchedule.sparse_then_dense(net(), 20), nn.Linear(4, 4)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(100):
            other(torch.ones(1, 4)).sum().backward()
            optimizer.step()
    assert schedule.applied_steps == 0
