"""When STEP switches, against AutoSwitch written again in plain Python on fp64 copies of the gradients."""

import itertools
from typing import Any

import pytest
import torch
from torch import nn

from semisparse import sparsify
from semisparse.errors import ConfigError, ScheduleError
from semisparse.recipes import RecipeSchedule, StepAdamW, step
from semisparse.testing import assert_as_good_as_torch
from tests.recipes.training import SPARSE, network

BETA2 = 0.8  # so the mean is over 5 steps
WINDOW = 5


class Watched:
    """A model whose gradients are given, shrinking from step to step, so that its second moments settle."""

    def __init__(self, dense_range: tuple[float, float], total: int, *, beta2: float = BETA2, **settings: Any) -> None:
        self.model = network()
        self.recipe = step(dense_range=dense_range)
        sparsify(self.model, self.recipe.config, select=list(SPARSE))
        self.weights = [self.model.get_submodule(name).weight for name in SPARSE]
        self.optimizer = StepAdamW(self.model.parameters(), lr=0.01, betas=(0.9, beta2), **settings)
        self.schedule = RecipeSchedule(self.recipe, self.model, self.optimizer, total)
        self.beta2 = beta2
        self.moments = [torch.zeros_like(weight, dtype=torch.float64) for weight in self.weights]
        self.changes: list[float] = []

    def gradients(self, number: int) -> None:
        with torch.no_grad():
            self.model(torch.zeros(1, 8))  # as in any training; gradients without a call look like a bypass
        generator = torch.Generator().manual_seed(number)
        for parameter in self.model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator) * 0.9**number
        if number == 3:
            self.weights[1].grad = None  # its second moment stays as it is

    def by_hand(self) -> None:
        total = entries = 0.0
        for index, weight in enumerate(self.weights):
            before = self.moments[index]
            if weight.grad is not None:
                self.moments[index] = self.beta2 * before + (1 - self.beta2) * weight.grad.double() ** 2
            total += (self.moments[index] - before).abs().sum().item()
            entries += weight.numel()
        self.changes.append(total / entries)

    def step(self, number: int) -> None:
        self.gradients(number)
        if not self.optimizer.variance_frozen:
            self.by_hand()
        self.optimizer.step()
        self.schedule.step()


def dry_means(steps: int = 60) -> list[float]:
    """The mean over the last five changes after each step, if nothing switched. The gradients do not depend on eps."""
    run = Watched((1.0, 1.0), 1000, eps=1e-30)
    for number in range(steps):
        run.step(number)
    return [sum(run.changes[max(0, end - WINDOW) : end]) / WINDOW for end in range(1, steps + 1)]


MEANS = dry_means()


@pytest.mark.parametrize(("settles_after", "low", "high", "wanted"), [
    (3, 0, 60, 10), (10, 0, 60, 10), (11, 0, 60, 20), (20, 0, 60, 20), (21, 0, 60, 30), (27, 0, 60, 30),
    (3, 15, 60, 20), (3, 20, 60, 20), (3, 21, 60, 30), (27, 0, 25, 25), (27, 0, 30, 30), (3, 7, 7, 7), (3, 1, 1, 1),
    (3, 0, 8, 8), (55, 0, 60, 60),
])  # fmt: skip
def test_the_switch_comes_when_the_rule_says(settles_after: int, low: int, high: int, wanted: int) -> None:
    """settles_after: the first step after which the mean is below eps; looked at every tenth step."""
    assert all(one > other for one, other in itertools.pairwise(MEANS[8:]))
    eps = (MEANS[settles_after - 2] + MEANS[settles_after - 1]) / 2
    if settles_after <= WINDOW:
        eps = 1.0
    run = Watched((low / 60, high / 60), 60, eps=eps)
    for number in range(60):
        assert run.schedule.phase == ("dense" if number < wanted else "sparse")
        assert run.optimizer.variance_frozen is (number >= wanted)
        assert all(run.model.get_submodule(name).sparse_enabled is (number >= wanted) for name in SPARSE)
        run.step(number)
    assert run.schedule.state_dict()["switched_at"] == wanted
    assert [phase.steps for phase in run.schedule.phases] == [wanted, 60 - wanted]


def test_the_changes_are_those_of_the_second_moments() -> None:
    run = Watched((1.0, 1.0), 1000, eps=1e-8)
    entries, plain, ours = sum(weight.numel() for weight in run.weights), [], []
    for number in range(13):
        olds = [run.optimizer.state[w]["exp_avg_sq"].clone() if w in run.optimizer.state else 0 for w in run.weights]
        run.step(number)
        news = [run.optimizer.state[w]["exp_avg_sq"] for w in run.weights]
        plain.append(sum((new - old).abs().sum() for new, old in zip(news, olds, strict=True)) / entries)
        ours.append(run.schedule.state_dict()["changes"][number % WINDOW])
    exact = torch.tensor(run.changes, dtype=torch.float64)
    assert_as_good_as_torch(torch.stack(ours), torch.stack(plain), exact)
    assert torch.equal(run.schedule.state_dict()["changes"], torch.stack([*ours[10:13], *ours[8:10]]))


def test_the_mean_must_be_complete() -> None:
    run = Watched((0.0, 1.0), 60, beta2=0.96, eps=1.0)  # 25 steps
    for number in range(40):
        assert run.schedule.phase == ("dense" if number < 30 else "sparse")
        run.step(number)


def test_only_groups_with_sparse_weights_must_agree() -> None:
    model = network()
    sparsify(model, step().config, select=list(SPARSE))
    others = [p for name, p in model.named_parameters() if name not in ("0.weight", "2.weight")]
    groups = [{"params": [model[0].weight, model[2].weight]}, {"params": others, "eps": 1e-5, "betas": (0.9, 0.5)}]
    RecipeSchedule(step(), model, StepAdamW(groups), 100)


def test_a_step_that_the_optimizer_did_not_make_is_noticed_and_not_counted() -> None:
    run = Watched((0.0, 1.0), 60, eps=1e-30)
    run.step(0)
    state = run.schedule.state_dict()
    assert run.schedule.step() is False
    assert run.schedule.state_dict()["applied_steps"] == state["applied_steps"] == 1
    assert torch.equal(run.schedule.state_dict()["changes"], state["changes"])
    run.step(1)
    assert run.schedule.applied_steps == 2


def test_a_second_optimizer_step_without_schedule_step_is_refused_and_moves_nothing() -> None:
    run = Watched((0.1, 0.9), 40)
    run.step(0)
    run.gradients(1)
    run.optimizer.step()
    weights = [weight.detach().clone() for weight in run.weights]
    with pytest.raises(ScheduleError, match="twice without schedule"):
        run.optimizer.step()
    assert all(torch.equal(weight, before) for weight, before in zip(run.weights, weights, strict=True))
    run.schedule.step()
    run.step(2)
    assert run.schedule.applied_steps == 3


def test_what_was_seen_before_loading_does_not_count_after_it() -> None:
    run = Watched((0.0, 1.0), 60, eps=1e-30)
    state = run.schedule.state_dict()
    run.gradients(0)
    run.optimizer.step()
    run.schedule.load_state_dict(state)
    assert run.schedule.step() is False
    after = run.schedule.state_dict()
    assert (after["applied_steps"], after["changes"].tolist()) == (state["applied_steps"], state["changes"].tolist())
    run.step(0)
    assert run.schedule.applied_steps == 1


def test_a_closure_is_refused_while_the_variance_is_watched() -> None:
    run = Watched((0.0, 0.1), 60, eps=1e-30)
    run.gradients(0)
    before = [p.detach().clone() for p in run.model.parameters()]
    with pytest.raises(ConfigError, match=r"optimizer.step\(closure\) .* AutoSwitch; step without closure"):
        run.optimizer.step(lambda: 0.0)
    assert all(torch.equal(p, old) for p, old in zip(run.model.parameters(), before, strict=True))
    for number in range(6):
        run.step(number)
    assert run.schedule.phase == "sparse"
    assert run.optimizer.step(lambda: 1.5) == 1.5  # nothing to watch any more
    run.schedule.step()


def test_optimizer_and_schedule_must_agree_on_the_variance() -> None:
    run = Watched((0.0, 0.1), 60, eps=1e-30)
    run.optimizer.freeze_variance()
    run.gradients(0)
    with pytest.raises(ScheduleError, match="variance_frozen=True, but the schedule's switched_at is None: load"):
        run.optimizer.step()
    whole, resumed = Watched((0.0, 0.1), 60, eps=1e-30), Watched((0.0, 0.1), 60, eps=1e-30)
    for number in range(8):
        whole.step(number)
    resumed.schedule.load_state_dict(whole.schedule.state_dict())  # and the optimizer's is forgotten
    resumed.gradients(8)
    with pytest.raises(ScheduleError, match="variance_frozen=False, but the schedule's switched_at is 6: load"):
        resumed.optimizer.step()


def test_nothing_is_measured_after_the_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Watched((0.0, 0.1), 60, eps=1e-30)
    for number in range(6):
        run.step(number)
    state = run.schedule.state_dict()
    monkeypatch.setattr(torch.Tensor, "float", lambda self: pytest.fail("the hook still works"))
    for number in range(6, 9):
        run.step(number)
    assert torch.equal(run.schedule.state_dict()["changes"], state["changes"])


def test_a_tied_weight_is_watched_once() -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    model[1].weight = model[0].weight
    sparsify(model, step().config)
    schedule = RecipeSchedule(step(), model, optimizer := StepAdamW(model.parameters(), betas=(0.9, BETA2)), 100)
    model[0].weight.grad = torch.full((8, 8), 2.0)
    optimizer.step()
    schedule.step()
    assert schedule.state_dict()["changes"][0].item() == pytest.approx((1 - BETA2) * 4)
