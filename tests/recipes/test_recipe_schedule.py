"""Every step of every recipe against formulas worked out by hand, from brute-force masks."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semisparse import Phase
from semisparse.errors import ScheduleError
from semisparse.recipes import RecipeSchedule, StepAdamW, fst
from semisparse.testing import assert_as_good_as_torch, assert_bit_equal
from tests.recipes import training
from tests.recipes.training import DECAY, RECIPES, SPARSE, TOTAL, Run, by_hand, kept, network

# The first step of each phase, for 24 steps: s sparse, d dense.
PHASES = {
    "dinov2": {0: "s", 17: "d"},
    "sr_ste": {0: "s", 18: "d"},
    "sr_ste by rows": {0: "s"},
    "fst": {0: "s", 20: "d"},
    "s_ste": {0: "s", 18: "d"},
    "step": {0: "d", 10: "s"},
    "held after a dense start": {0: "d", 10: "s"},
}


class ByHand:
    """What the swapped layers of a run must compute, from brute-force masks and nothing of the recipe's own."""

    def __init__(self, run: Run) -> None:
        self.run, self.every, self.mask = run, run.recipe.refresh_every, run.recipe.config.weight
        self.held: dict[str, Tensor] = {}
        self.age = 0
        self.was_sparse = False
        self.scales = {name: training.scale_by_hand(run.layer(name).weight).float() for name in SPARSE}

    def begin_step(self, sparse: bool) -> None:
        """Choose masks where they are chosen at this step."""
        if sparse and (not self.was_sparse or self.age == self.every):
            self.age = 0
            if self.mask != "soft":
                self.held = {name: by_hand(self.run.layer(name).weight, self.mask) for name in SPARSE}
        self.was_sparse = sparse
        self.age += sparse

    def weight(self, name: str, sparse: bool) -> Tensor:
        weight = self.run.layer(name).weight.detach()
        if not sparse:
            return weight
        if self.mask == "soft":
            return (training.shrunk(weight).float() * self.scales[name]).float()
        return kept(weight, self.held[name])


def observed(run: Run, seen: dict[str, tuple[Tensor, Tensor]]) -> Callable[[], None]:
    """Keep input and output of the swapped layers at each forward."""
    handles = [
        run.layer(name).register_forward_hook(
            lambda _, inputs, output, name=name: seen.update({name: (inputs[0].detach(), output.detach())})
        )
        for name in SPARSE
    ]
    return lambda: [handle.remove() for handle in handles]


def assert_decayed(gradient: Tensor, plain: Tensor, mask: Tensor, weight: Tensor, decay: float) -> None:
    """The gradient is the plain one plus decay times the pruned part of the weight."""
    pruned = torch.where(mask, 0, weight)
    assert_as_good_as_torch(gradient, plain + decay * pruned, plain.double() + decay * pruned.double())


@pytest.mark.parametrize("name", RECIPES)
def test_each_step_of_each_recipe_computes_what_its_formulas_say(name: str) -> None:
    run = Run(RECIPES[name]())
    hand, phase, seen, stale = ByHand(run), "", {}, 0
    observed(run, seen)
    gradients: dict[str, Tensor] = {}
    run.optimizer.register_step_pre_hook(  # the last hook: it sees what the optimizer will
        lambda *_: gradients.update({name: run.layer(name).weight.grad.clone() for name in SPARSE})
    )
    for number in range(TOTAL):
        phase = PHASES[name].get(number, phase)
        sparse = phase == "s"
        hand.begin_step(sparse)
        run.backward(number)
        for layer, (x, y) in seen.items():
            assert_bit_equal(y, F.linear(x, hand.weight(layer, sparse), run.layer(layer).bias.detach()))
        plain = {layer: run.layer(layer).weight.grad.clone() for layer in SPARSE}
        weights = {layer: run.layer(layer).weight.detach().clone() for layer in SPARSE}
        assert run.apply() is True
        for layer in SPARSE:
            if sparse and run.recipe.decay:
                assert_decayed(gradients[layer], plain[layer], hand.held[layer], weights[layer], run.recipe.decay)
            else:
                assert_bit_equal(gradients[layer], plain[layer])
        stale += (
            run.recipe.refresh_every > 1
            and sparse
            and not torch.equal(hand.held["0"], by_hand(weights["0"], "transposable"))
        )
    assert len(seen) == len(SPARSE)
    assert stale or run.recipe.refresh_every == 1  # held masks were others than the weights would have chosen


def test_scaled_steps_are_the_same_and_clipping_comes_before_the_decay() -> None:
    run = Run(fst(decay=DECAY, refresh_every=3), scaled=True)
    gradients = {}
    run.optimizer.register_step_pre_hook(lambda *_: gradients.update(w=run.layer("0").weight.grad.clone()))
    for number in range(7):
        run.backward(number)
        run.scaler.unscale_(run.optimizer)
        nn.utils.clip_grad_norm_(run.model.parameters(), 1e-3)
        clipped, weight = run.layer("0").weight.grad.clone(), run.layer("0").weight.detach().clone()
        if number in (0, 3, 6):
            mask = by_hand(weight, "transposable")
        assert clipped.norm() < 1.1e-3
        run.apply()
        torch.testing.assert_close(gradients["w"], clipped + DECAY * torch.where(mask, 0, weight))


def test_accumulated_gradients_make_one_step() -> None:
    run = Run(fst(decay=DECAY, refresh_every=2), optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=0.1))
    for number in range(5):
        run.optimizer.zero_grad()
        for part in range(3):
            run.model(torch.randn(2, 8, generator=torch.Generator().manual_seed(10 * number + part))).sum().backward()
        plain, weight = run.layer("0").weight.grad.clone(), run.layer("0").weight.detach().clone()
        if number % 2 == 0:
            mask = by_hand(weight, "transposable")
        run.apply()
        torch.testing.assert_close(run.layer("0").weight.grad, plain + DECAY * torch.where(mask, 0, weight))
    assert run.schedule.applied_steps == 5


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9),
    "fused": lambda m: torch.optim.AdamW(m.parameters(), lr=0.02, fused=True),
    "rmsprop": lambda m: torch.optim.RMSprop(m.parameters(), lr=0.01),
    "groups": lambda m: torch.optim.Adam(
        [{"params": [m[0].weight]}, {"params": [p for p in m.parameters() if p is not m[0].weight], "lr": 0.1}]
    ),
    "plain use of StepAdamW": lambda m: StepAdamW(m.parameters(), lr=0.02),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("name", ["dinov2", "sr_ste", "fst", "s_ste"])
def test_any_optimizer_serves(kind: str, name: str) -> None:
    torch.optim.AdamW(network().parameters())  # whose step torch then wraps in hooks
    run = Run(RECIPES[name](), optimizer=OPTIMIZERS[kind])
    decayed = []
    for number in range(3):
        run.backward(number)
        before, weight = run.layer("2").weight.grad.clone(), run.layer("2").weight.detach().clone()
        run.apply()
        decayed.append((run.layer("2").weight.grad - before).abs().max() > 0)
        if run.recipe.decay:
            if number == 0 or name == "sr_ste":
                mask = by_hand(weight, "transposable")
            assert_decayed(run.layer("2").weight.grad, before, mask, weight, DECAY)
    assert all(decayed) if run.recipe.decay else not any(decayed)


@pytest.mark.parametrize("name", RECIPES)
def test_the_model_holds_none_of_the_state(name: str) -> None:
    run, plain = Run(RECIPES[name]()), network()
    run.steps(0, 12)
    assert list(run.model.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(run.model.state_dict())


def test_the_plan_shows() -> None:
    run = Run(fst(refresh_every=3))
    assert run.schedule.recipe is run.recipe
    assert run.schedule.phases == (Phase("sparse", 20), Phase("dense", 4))
    assert repr(run.schedule) == "RecipeSchedule(20 sparse -> 4 dense; 0 applied, now sparse)"


@pytest.mark.parametrize("name", ["sparse_then_dense", "dense_sparse_dense"])
def test_a_recipe_brings_its_own_phases(name: str) -> None:
    with pytest.raises(ScheduleError, match="a recipe has its own phases"):
        getattr(RecipeSchedule, name)(nn.Linear(4, 4), 10, 0.5)
