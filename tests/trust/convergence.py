"""B8: two small models trained by sparse products and masked dense: the same losses; and resumed in the middle."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import semisparse
from semisparse.config import SparseConfig
from semisparse.exactness import ERROR_RATIO
from semisparse_lab.models.gpt import GPTConfig, build_gpt
from semisparse_lab.models.vit import ViTConfig, build_model
from tests.trust.machine import Machine, differing
from tests.trust.outcome import Part, Row

STEPS = 300
SEEDS = 3
WINDOW = 25
"""Steps over which the loss is averaged before curves are compared."""

ABSOLUTE, RELATIVE = 1e-2, 5e-2
"""How far two curves may be apart: what Liger-Kernel's tests allow for losses in bf16."""

BATCH, CONTEXT, PIXELS = 32, 64, 16
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Subject:
    """A model and what it learns.

    Attributes:
        name: Of both.
        build: Makes the model from a seed.
        batch: Inputs and targets of a step, from its generator.
    """

    name: str
    build: Callable[[int], nn.Module]
    batch: Callable[[torch.Generator], Batch]


def subjects(machine: Machine) -> list[Subject]:
    """A GPT on the bytes of this package's source, and a ViT on noise that a fixed linear map labels."""
    source = b"".join(path.read_bytes() for path in sorted(Path(semisparse.__file__).parent.glob("*.py")))
    text = torch.frombuffer(bytearray(source), dtype=torch.uint8).long()
    labels = torch.randn(PIXELS * PIXELS, 10, generator=torch.Generator().manual_seed(0))

    def bytes_of(generator: torch.Generator) -> Batch:
        starts = torch.randint(len(text) - CONTEXT - 1, (BATCH,), generator=generator)
        rows = torch.stack([text[start : start + CONTEXT + 1] for start in starts.tolist()]).to(machine.device)
        return rows[:, :-1], rows[:, 1:]

    def images(generator: torch.Generator) -> Batch:
        drawn = torch.randn(BATCH, 1, PIXELS, PIXELS, generator=generator)
        return drawn.to(machine.device), (drawn.flatten(1) @ labels).argmax(1).to(machine.device)

    gpt = GPTConfig(context=CONTEXT, width=128, depth=2, heads=4)
    vit = ViTConfig(image_size=PIXELS, patch_size=4, width=128, depth=2)
    return [
        Subject("GPT", lambda seed: build_gpt(gpt, seed, machine.device), bytes_of),
        Subject("ViT", lambda seed: build_model(vit, seed, machine.device), images),
    ]


class Run:
    """A model in training, in autocast to bf16 over fp32 weights.

    Args:
        machine: Where.
        subject: What.
        seed: Of initial weights and data.
        backend: Of the sparse layers; None for none.
    """

    def __init__(self, machine: Machine, subject: Subject, seed: int, backend: Any) -> None:
        self.machine, self.subject, self.backend = machine, subject, backend
        self.model = subject.build(seed)
        if backend is not None:
            semisparse.sparsify(self.model, SparseConfig(backend=backend), select="mlp")
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.generator = torch.Generator().manual_seed(seed)
        self.losses: list[Tensor] = []

    def train(self, steps: int, check: Callable[[], None]) -> None:
        """More steps. PyTorch's own attention, whose backward adds up in no fixed order, is not used.

        Args:
            steps: How many.
            check: Raises where there is no time for all of them.
        """
        for _ in range(steps):
            check()
            inputs, targets = self.subject.batch(self.generator)
            self.optimizer.zero_grad(set_to_none=True)
            with sdpa_kernel(SDPBackend.MATH):
                with torch.autocast(self.machine.device.type, torch.bfloat16):
                    outputs = self.model(inputs)
                loss = F.cross_entropy(outputs.float().flatten(0, -2), targets.flatten())
                loss.backward()
            self.optimizer.step()
            self.losses.append(loss.detach())

    def state(self) -> dict[str, Any]:
        """All that training depends on."""
        parts = {"model": self.model, "optimizer": self.optimizer}
        saved = {name: copy.deepcopy(part.state_dict()) for name, part in parts.items()}
        return {**saved, "generator": self.generator.get_state()}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])

    def curve(self) -> Tensor:
        """Means of the loss over WINDOW steps, fp64."""
        losses = torch.stack(self.losses).double()
        return torch.stack([window.mean() for window in losses.split(WINDOW)])


def apart(ours: Tensor, other: Tensor) -> float:
    """The largest distance of two curves, in units of what is allowed."""
    share = (ours - other).abs() / (ABSOLUTE + RELATIVE * other.abs())
    return float(share.nan_to_num(torch.inf).max())


def run(machine: Machine, part: Part, steps: int = STEPS, seeds: int = SEEDS) -> None:
    """Train until all is compared or the budget is spent.

    Args:
        machine: Where.
        part: Gets the rows.
        steps: Of each run.
        seeds: Of each model.
    """
    machine.tune_quickly()
    rows: list[Row] = []
    for subject in subjects(machine):
        with part.attempt(f"{subject.name}, first step"):
            worse = _first_step(machine, subject)
            what = f"{subject.name}: error of the first gradients against fp64, in units of masked dense's"
            rows.append(Row("B8", what, "all parameters", worse, ERROR_RATIO))
        found = Curves(subject.name, steps, seeds)
        for seed in range(seeds):
            if part.left() <= 0:
                break
            with part.attempt(f"{subject.name}, seed {seed}"):
                kinds = (machine.backend, "dense", None)
                found.add([_curve(machine, part, subject, seed, steps, kind) for kind in kinds])
            part.renew([*rows, *found.rows()])
        rows += found.rows()
        resumed = Row("B8", f"{subject.name}: parameters that differ after resuming", "not run", None)
        with part.attempt(f"{subject.name}, resumed"):
            resumed.figure = _resumed(machine, part, subject, steps)
            resumed.size = f"{steps} steps, resumed after {steps // 2}"
        rows.append(resumed)
        part.renew(rows)


def _curve(machine: Machine, part: Part, subject: Subject, seed: int, steps: int, backend: Any) -> Tensor:
    one = Run(machine, subject, seed, backend)
    one.train(steps, part.check)
    return one.curve()


class Curves:
    """The losses of one model.

    Args:
        name: Of the model.
        steps: Of each run.
        seeds: That are asked for.
    """

    def __init__(self, name: str, steps: int, seeds: int) -> None:
        self.name, self.steps, self.seeds = name, steps, seeds
        self.found: list[list[Tensor]] = []

    def add(self, curves: list[Tensor]) -> None:
        """Those of one seed: sparse products, masked dense, and no mask."""
        self.found.append(curves)

    def rows(self) -> list[Row]:
        """As lines of the table."""
        size = f"{len(self.found)} of {self.seeds} seeds, {self.steps} steps each"
        rows = [Row("B8", f"{self.name}: seeds", size, len(self.found), self.seeds, "at least")]
        if not self.found:
            return rows
        far = f"{self.name}: sparse products against masked dense, distance of losses by what is allowed"
        rows.append(Row("B8", far, size, max(apart(ours, dense) for ours, dense, _ in self.found), 1))
        last = torch.stack([torch.stack([curve[-1] for curve in curves]) for curves in self.found])  # seeds x kinds
        if len(last) > 1:
            gap = f"{self.name}: mean gap of last losses, in units of two standard deviations between seeds"
            rows.append(Row("B8", gap, size, mean_gap(last[:, 0], last[:, 1]), 1))
        learned = min(float(curves[0][-1] / curves[0][0]) for curves in self.found)
        rows.append(Row("B8", f"{self.name}: last loss over first", size, learned, None, "reported"))
        against = float((last[:, 0] / last[:, 2]).mean())
        rows.append(
            Row("B8", f"{self.name}: last loss of 2:4 over that without a mask", size, against, None, "reported")
        )
        return rows


def mean_gap(ours: Tensor, other: Tensor) -> float:
    """How far the means are apart, in units of two standard deviations, which both share; inf where one is not finite.

    Args:
        ours: Of at least two seeds.
        other: Of the same seeds.
    """
    gap, spread = float((ours - other).mean().abs()), float(((ours.var() + other.var()) / 2).sqrt())
    if gap == 0:
        return 0.0
    return gap / (2 * spread) if spread > 0 and gap < float("inf") else float("inf")


def _first_step(machine: Machine, subject: Subject) -> float:
    """The error of all gradients of the first step as one vector, against fp64, over that of masked dense."""
    inputs, targets = subject.batch(torch.Generator().manual_seed(0))
    exact = Run(machine, subject, 0, "dense")
    exact.model.double()
    right = _gradients(exact, inputs.double() if inputs.is_floating_point() else inputs, targets)
    errors = []
    for backend in (machine.backend, "dense"):
        one = Run(machine, subject, 0, backend)
        with torch.autocast(machine.device.type, torch.bfloat16):
            found = _gradients(one, inputs, targets)
        errors.append(
            sum(float((ours.double() - other).square().sum()) for ours, other in zip(found, right, strict=True))
        )
    ours, dense = errors
    return (ours / dense) ** 0.5 if dense else float("inf") if ours else 0.0


def _gradients(run: Run, inputs: Tensor, targets: Tensor) -> list[Tensor]:
    with sdpa_kernel(SDPBackend.MATH):
        outputs = run.model(inputs)
        outputs = outputs if outputs.dtype is torch.float64 else outputs.float()
        loss = F.cross_entropy(outputs.flatten(0, -2), targets.flatten())
        return list(torch.autograd.grad(loss, list(run.model.parameters())))


def _resumed(machine: Machine, part: Part, subject: Subject, steps: int) -> int:
    """Parameters that differ in a bit between a run, and one that was resumed in its middle."""
    whole, again = (Run(machine, subject, 0, machine.backend) for _ in range(2))
    whole.train(steps // 2, part.check)
    state = whole.state()
    whole.train(steps - steps // 2, part.check)
    again.load(state)
    again.train(steps - steps // 2, part.check)
    return int(differing(list(again.model.parameters()), list(whole.model.parameters())))
