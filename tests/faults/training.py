"""A training that is killed, forked or given a poisoned loss: it goes on with the bits of one that was not."""

import copy
import hashlib
import io
import math
import os
import random
import signal
import time
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semisparse import recipes, sparsify
from semisparse.files import write_atomically
from semisparse.recipes import Recipe, RecipeSchedule, StepAdamW
from tests.faults.fault import Fault, ended, forked

STEPS = 50
RECIPES: dict[str, Recipe] = {
    "fst": recipes.fst(refresh_every=7),
    "s_ste": recipes.s_ste(),
    "sr_ste": recipes.sr_ste(),
    "step": recipes.step(),
}


class Training:
    """Model, optimizer, scaler and schedule of a run of STEPS steps, at its start.

    Args:
        name: Of its recipe.
    """

    def __init__(self, name: str) -> None:
        torch.manual_seed(0)
        recipe = RECIPES[name]
        self.model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Dropout(0.1), nn.Linear(32, 16))
        sparsify(self.model, recipe.config)
        kind = torch.optim.AdamW if recipe.dense_range is None else StepAdamW
        self.optimizer = kind(self.model.parameters(), lr=1e-2)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=8)
        self.schedule = RecipeSchedule(recipe, self.model, self.optimizer, STEPS, seed=3)

    def step(self, number: int, poison: float = 1.0, entry: int | None = None) -> None:
        """One optimizer step; its inputs depend on number, its dropout on the state of the generator.

        Args:
            number: Of the step.
            poison: Times the loss, or in the place of one gradient.
            entry: Of the first weight, whose gradient alone is poisoned; None for the loss.
        """
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(number))
        self.optimizer.zero_grad()
        self.scaler.scale(F.mse_loss(self.model(x), x) * (poison if entry is None else 1.0)).backward()
        if entry is not None:
            grad = self.model[0].weight.grad
            assert isinstance(grad, Tensor)
            grad.view(-1)[entry] = poison
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step(self.scaler)

    def state(self) -> dict[str, Any]:
        """All that the next step depends on."""
        parts = {"model": self.model, "optimizer": self.optimizer, "scaler": self.scaler, "schedule": self.schedule}
        return {name: part.state_dict() for name, part in parts.items()} | {"random": torch.get_rng_state()}

    def save(self, path: Path, done: int) -> None:
        """Write the state after so many steps."""
        content = io.BytesIO()
        torch.save(self.state() | {"done": done}, content)
        write_atomically(path, content.getvalue())

    def load(self, path: Path) -> int:
        """Take over what was saved; the number of steps that were done."""
        saved = torch.load(path, weights_only=True)
        for name in ("model", "optimizer", "scaler", "schedule"):
            getattr(self, name).load_state_dict(saved[name])
        torch.set_rng_state(saved["random"])
        return int(saved["done"])


def digest(state: Any) -> str:
    """Of all bits of a state."""
    found = hashlib.sha256()

    def take(value: Any) -> None:
        if isinstance(value, Tensor):
            found.update(f"{value.dtype}{tuple(value.shape)}".encode())
            found.update(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, dict):
            for name in sorted(value, key=str):
                found.update(str(name).encode())
                take(value[name])
        elif isinstance(value, (list, tuple)):
            for one in value:
                take(one)
        else:
            found.update(repr(value).encode())

    take(state)
    return found.hexdigest()


@cache
def uninterrupted(name: str) -> str:
    """The digest that a run of one piece ends with."""
    run = Training(name)
    for number in range(STEPS):
        run.step(number)
    return digest(run.state())


def _go_on(name: str, path: Path, told: int) -> None:
    run = Training(name)
    done = run.load(path) if path.exists() else 0
    for number in range(done, STEPS):
        run.step(number)
        run.save(path, number + 1)
        os.write(told, b".")


def interrupted(how: signal.Signals, count: int, folder: Path) -> dict[str, int]:
    """End runs at random moments until each has come to its end, and compare how they end."""
    draw, sent, runs = random.Random(count), 0, 0
    names = list(RECIPES)
    while sent < count:
        name, path = names[runs % len(names)], folder / f"{runs}.pt"
        wanted, left = uninterrupted(name), min(4, count - sent)
        while True:
            heard, told = os.pipe()
            child = forked(partial(_go_on, name, path, told))
            os.close(told)
            if left:
                for _ in range(draw.randrange(1, 10)):
                    os.read(heard, 1)
                time.sleep(draw.uniform(0, 0.008))
                os.kill(child, how)
            code = ended(child)
            os.close(heard)
            if code == 0:
                break
            assert code == -how, f"a run ended with {code}"
            sent, left = sent + 1, left - 1
        run = Training(name)
        assert run.load(path) == STEPS
        assert digest(run.state()) == wanted, f"{name} ends with other bits"
        assert [one.name for one in folder.iterdir()] == [path.name], "a rest of a save is left"
        path.unlink()
        runs += 1
    return {f"runs of {STEPS} steps with the bits of an uninterrupted one": runs}


def poisoned(count: int, folder: Path) -> dict[str, int]:
    """Steps whose loss or one gradient is NaN or infinite: nothing moves but the scale, and later steps are applied."""
    draw, names = random.Random(count), list(RECIPES)
    for turn in range(count):
        name, poison = names[turn % len(names)], draw.choice((math.nan, math.inf, -math.inf))
        run, good = Training(name), draw.randrange(1, 12)
        for number in range(good):
            run.step(number)
        before = copy.deepcopy(run.state())
        masks = [layer.chosen_mask().clone() for layer in _layers(run.model)]
        scale = run.scaler.get_scale()
        for _ in range(draw.choice((1, 3))):
            run.step(good, poison, draw.randrange(512) if turn % 2 else None)
        after = run.state()
        for part in ("model", "optimizer"):
            assert digest(before[part]) == digest(after[part]), f"{name}, {poison}: the {part} moved"
        assert all(
            torch.equal(mask, layer.chosen_mask()) for mask, layer in zip(masks, _layers(run.model), strict=True)
        )
        assert run.scaler.get_scale() < scale
        assert run.schedule.applied_steps == good, "a skipped step counts"
        run.step(good)
        assert run.schedule.applied_steps == good + 1
        assert all(bool(tensor.isfinite().all()) for tensor in run.model.state_dict().values())
    return {"weights, moments, masks and counters that moved": 0}


def _layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "chosen_mask")]


def forks(count: int, folder: Path) -> dict[str, int]:
    """A process that is forked in mid-training trains on with the bits of its parent."""
    names = list(RECIPES)
    for turn in range(count):
        run, answer = Training(names[turn % len(names)]), folder / "digest"
        for number in range(3):
            run.step(number)

        def train_on(run: Training = run, answer: Path = answer) -> None:
            for number in range(3, 6):
                run.step(number)
            answer.write_text(digest(run.state()))

        assert ended(forked(train_on)) == 0
        for number in range(3, 6):
            run.step(number)
        assert answer.read_text() == digest(run.state()), "the two processes differ"
    return {"children with other bits than their parent": 0}


FAULTS = [
    Fault("kill -9 in training that saves each step", "", "resumed, it ends with the bits of an uninterrupted run",
          4, 200, partial(interrupted, signal.SIGKILL), "kills"),
    Fault("SIGTERM in training that saves each step", "", "resumed, it ends with the bits of an uninterrupted run",
          2, 48, partial(interrupted, signal.SIGTERM), "signals"),
    Fault("poisoned loss or gradient under GradScaler", "", "weights, moments, masks and schedule do not move", 4, 100,
          poisoned, "steps"),
    Fault("fork in mid-training", "", "parent and child go on with the same bits", 2, 40, forks, "forks"),
]  # fmt: skip
