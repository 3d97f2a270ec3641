"""The timed loop: what counts as training, and how a run stops."""

import itertools
import math
import time
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from semisparse_lab.tasks.next_token import TextScore
from semisparse_lab.tasks.task import Batch
from semisparse_lab.train.config import TrainConfig, adamw
from semisparse_lab.train.measure import WARM_UP_STEPS
from semisparse_lab.train.results import PhaseSpan
from semisparse_lab.train.timed import Plan, TimedRun, Watch, train_timed, without_starts

SLEPT = 0.05


def run(steps: int, watch: Watch = lambda run: True) -> TimedRun:
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    config = TrainConfig(epochs=1, batch_size=1, lr=1e-2)

    def batches() -> Iterator[Batch]:
        for number in itertools.count():
            yield torch.full((1, 4), float(number % 3)), torch.zeros(1)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return model(x).square().mean()

    def score() -> TextScore:
        assert not model.training and not torch.is_grad_enabled()
        time.sleep(SLEPT)
        return TextScore(1.0, 2.0, 3)

    plan = Plan(steps=steps, score_every=8, curve_every=4)
    return train_timed(model, loss, batches(), score, adamw(model, config), config, plan, watch=watch)


def test_points_are_at_their_steps_and_scoring_is_not_training() -> None:
    done = run(20)
    assert [point.step for point in done.curve] == [4, 8, 12, 16, 20]
    assert [point.step for point in done.scores] == [8, 16, 20]
    assert done.finished and all(math.isfinite(point.loss) for point in done.curve)
    assert done.score_seconds >= 3 * SLEPT
    seconds = [point.seconds for point in done.curve]
    assert seconds == sorted(seconds) and done.seconds == seconds[-1] == done.scores[-1].seconds
    assert [(phase.kind, phase.start, phase.end) for phase in done.phases] == [("dense", 0, 20)]


def test_a_run_stops_where_its_watch_says_so() -> None:
    seen: list[TimedRun] = []

    def watch(run: TimedRun) -> bool:
        seen.append(run)
        return len(run.scores) < 2

    done = run(20, watch)
    assert not done.finished and done == seen[-1] and [point.step for point in done.scores] == [8, 16]
    whole = run(20)
    assert [point.loss for point in done.curve] == [point.loss for point in whole.curve][:4]


def test_the_first_steps_of_a_phase_count_as_its_median() -> None:
    first = WARM_UP_STEPS + 5
    measured = [9.0, *[1.0] * (first - 1), 7.0, *[2.0] * (WARM_UP_STEPS + 1)]
    phases = (PhaseSpan("sparse", 0, first, 1.0), PhaseSpan("dense", first, len(measured), 2.0))
    counted, starts = without_starts(measured, phases)
    assert counted == [1.0] * first + [2.0] * (WARM_UP_STEPS + 2)
    assert starts == (8.0, 5.0)
    assert sum(counted) + sum(starts) == pytest.approx(sum(measured))
