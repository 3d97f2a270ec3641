"""Short runs under recipes, and what they must compute, worked out by hand."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from semisparse import SemiSparseLinear, sparsify
from semisparse.recipes import Recipe, RecipeSchedule, StepAdamW, dinov2, fst, s_ste, sr_ste, step
from semisparse.testing import assert_bit_equal
from tests.reference import brute
from tests.support import brute_mask

TOTAL = 24
DECAY = 0.25
SPARSE = ("0", "2")  # names of the layers that are swapped

RECIPES: dict[str, Callable[[], Recipe]] = {
    "dinov2": dinov2,
    "sr_ste": lambda: sr_ste(decay=DECAY, sparse_fraction=0.75),
    "sr_ste by rows": lambda: sr_ste(decay=DECAY, weight="row"),
    "fst": lambda: fst(decay=DECAY, refresh_every=3),
    "s_ste": lambda: s_ste(sparse_fraction=0.75),
    "step": lambda: step(dense_range=(0.1, 0.75)),
    "held after a dense start": lambda: Recipe(name="mine", refresh_every=4, decay=0.01, dense_range=(0.1, 0.75)),
}
# What AutoSwitch compares with: of the size of the gradients' squares, so that it switches at its first look.
EPS = 1e-2


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8), nn.GELU(), nn.Linear(8, 4))


def optimizer_for(recipe: Recipe, model: nn.Module, **settings: Any) -> torch.optim.Optimizer:
    if recipe.dense_range is not None:
        return StepAdamW(model.parameters(), **{"lr": 0.1, "betas": (0.9, 0.8), "eps": EPS, **settings})
    return torch.optim.AdamW(model.parameters(), **{"lr": 0.1, **settings})


class Run:
    """A short training under a recipe that can be saved and resumed."""

    def __init__(
        self, recipe: Recipe, *, scaled: bool = False, total: int = TOTAL, optimizer: Any = None, **settings: Any
    ) -> None:
        self.recipe, self.model = recipe, network()
        sparsify(self.model, recipe.config, select=list(SPARSE))
        self.optimizer = optimizer_for(recipe, self.model, **settings) if optimizer is None else optimizer(self.model)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=3) if scaled else None
        self.schedule = RecipeSchedule(recipe, self.model, self.optimizer, total)

    def layer(self, name: str) -> SemiSparseLinear:
        return self.model.get_submodule(name)

    def backward(self, seed: int) -> Tensor:
        """Gradients of a loss, and noise on those of the sparse weights, without which the masks would soon settle."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(6, 8, generator=generator)
        self.optimizer.zero_grad()
        loss = self.model(x).square().mean()
        scale = 1.0 if self.scaler is None else self.scaler.get_scale()
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        for name in SPARSE:
            weight = self.layer(name).weight
            weight.grad += scale * torch.randn(weight.shape, generator=generator).mul_(0.05)
        return loss.detach()

    def apply(self) -> bool:
        if self.scaler is None:
            self.optimizer.step()
            return self.schedule.step()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return self.schedule.step(self.scaler)

    def steps(self, first: int, last: int, overflows: frozenset[int] = frozenset()) -> list[Tensor]:
        losses = []
        for number in range(first, last):
            losses.append(self.backward(number))
            if number in overflows:
                self.layer("0").weight.grad[0, 0] = float("inf")
            assert self.apply() is (number not in overflows)
        return losses

    def parts(self) -> dict[str, Any]:
        parts = {"model": self.model, "optimizer": self.optimizer, "schedule": self.schedule}
        return parts if self.scaler is None else {**parts, "scaler": self.scaler}

    def state(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self.parts().items()}

    def save(self, path: Any) -> None:
        torch.save(self.state(), path)

    def load(self, path: Any) -> None:
        state = torch.load(path, weights_only=True)
        for name, part in self.parts().items():
            part.load_state_dict(state[name])


def assert_same(ours: Any, other: Any) -> None:
    """Nested states with the same keys, types and bits."""
    assert type(ours) is type(other)
    if isinstance(ours, Tensor):
        assert_bit_equal(ours, other)
    elif isinstance(ours, dict):
        assert ours.keys() == other.keys()
        for key in ours:
            assert_same(ours[key], other[key])
    elif isinstance(ours, (list, tuple)):
        assert len(ours) == len(other)
        for one, two in zip(ours, other, strict=True):
            assert_same(one, two)
    else:
        assert ours == other


def row_mask(weight: Tensor) -> Tensor:
    """The two largest magnitudes of each four along the columns, one group after the other."""
    groups = weight.detach().numpy().reshape(-1, 4)
    return torch.from_numpy(np.stack([brute.row(group) for group in groups]).reshape(weight.shape))


def by_hand(weight: Tensor, mask: str) -> Tensor:
    return row_mask(weight) if mask == "row" else brute_mask(weight)


def kept(weight: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, weight.detach(), 0)


def shrunk(weight: Tensor) -> Tensor:
    """S(W) of S-STE, entry by entry in fp64: sign(a) * max(|a| - t, 0), t the second smallest magnitude of four."""
    groups = weight.detach().double().numpy().reshape(-1, 4)
    small = np.sort(np.abs(groups), axis=1)[:, 1:2]
    soft = np.where(np.abs(groups) > small, np.sign(groups) * (np.abs(groups) - small), 0.0)
    return torch.from_numpy(soft.reshape(weight.shape))


def scale_by_hand(weight: Tensor) -> Tensor:
    """<W, S> / <S, S>."""
    soft = shrunk(weight)
    return (weight.detach().double() * soft).sum() / soft.square().sum()
