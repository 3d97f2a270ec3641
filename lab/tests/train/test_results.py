"""What a run says of itself."""

import math
from dataclasses import replace

import pytest

from lab.tests.made_runs import DENSE
from semisparse_lab.train.results import RunResult, Scores


def with_losses(train: float = 1.0, validation: float = 1.0, test: float = 0.1, skipped: int = 0) -> RunResult:
    first, second, third = DENSE.epochs
    second = replace(second, train_loss=train, validation=Scores(validation, 0.5))
    return replace(DENSE, epochs=(first, second, third), test=Scores(test, 0.9), skipped_steps=skipped)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_run_diverged_where_a_loss_is_not_finite(value: float) -> None:
    assert not with_losses().diverged
    assert all(with_losses(**{name: value}).diverged for name in ("train", "validation", "test"))
    # A gradient scaler skips steps of such losses until it has found its scale.
    assert not with_losses(train=value, skipped=1).diverged
    assert with_losses(validation=value, skipped=1).diverged and with_losses(test=value, skipped=1).diverged
    last = replace(DENSE.epochs[-1], train_loss=value)
    assert replace(DENSE, epochs=(*DENSE.epochs[:-1], last), skipped_steps=1).diverged
