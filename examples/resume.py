"""Stop a sparse training, resume it from a file in new objects, and end with the numbers of an uninterrupted run.

    python examples/resume.py                        # stops in the sparse phase
    python examples/resume.py --stop-at 180          # stops in the dense phase

What is saved: model, optimizer and schedule. The schedule's state has the number of steps that counted and what a
recipe holds: fst keeps its masks for some steps, so a run that chose new ones would differ. Batches depend only on the
number of the step, so no state of the data needs to be saved.
"""

import argparse
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semisparse import densify, recipes, sparsify

FEATURES, CLASSES = 32, 8
RECIPE = recipes.fst()


def new_model(width: int, device: str) -> nn.Module:
    """The same weights at every call."""
    torch.manual_seed(0)
    layers = (nn.Linear(FEATURES, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, CLASSES))
    return nn.Sequential(*layers).to(device)


def batch(step: int, device: str) -> tuple[Tensor, Tensor]:
    """64 inputs, which depend on step alone, and their classes."""
    x = torch.randn(64, FEATURES, generator=torch.Generator().manual_seed(step))
    return x.to(device), (x[:, :CLASSES] + 0.5 * x[:, CLASSES : 2 * CLASSES]).argmax(dim=1).to(device)


class Training:
    """Model, optimizer and schedule of a run of `steps` steps, at its start.

    A run that goes on builds the same three in the same way, and then loads what was saved.
    """

    def __init__(self, steps: int, width: int, device: str) -> None:
        self.device = device
        self.model = new_model(width, device)
        sparsify(self.model, RECIPE.config, select=["0", "2"])
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.schedule = recipes.RecipeSchedule(RECIPE, self.model, self.optimizer, steps)

    def run(self, begin: int, end: int) -> float:
        """Train steps begin (included) to end (excluded); returns the last loss."""
        for step in range(begin, end):
            x, target = batch(step, self.device)
            with torch.autocast(self.device.split(":")[0], torch.bfloat16):
                loss = F.cross_entropy(self.model(x), target)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
        return loss.item()

    def save(self, path: Path, step: int) -> None:
        """Save between two steps: after schedule.step(), before the next forward."""
        parts = {"model": self.model, "optimizer": self.optimizer, "schedule": self.schedule}
        torch.save({"step": step, **{name: part.state_dict() for name, part in parts.items()}}, path)

    def load(self, path: Path) -> int:
        """Take over what was saved; returns the step to go on with."""
        saved = torch.load(path, map_location=self.device, weights_only=True)
        for name in ("model", "optimizer", "schedule"):  # the schedule last: it switches the layers
            getattr(self, name).load_state_dict(saved[name])
        return saved["step"]

    def weights(self) -> dict[str, Tensor]:
        """The state_dict of the plain model that the run ends with."""
        densify(self.model, weights="masked" if self.schedule.phase == "sparse" else "dense")
        return self.model.state_dict()


def main() -> None:
    """Compare the two ways bit for bit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--stop-at", type=int, default=70)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    if not 0 < options.stop_at < options.steps:
        parser.error(f"--stop-at {options.stop_at} must lie between 0 and --steps {options.steps}")
    sizes = options.steps, options.width, options.device

    whole = Training(*sizes)
    print(f"in one go: loss {whole.run(0, options.steps):.6f}")

    first = Training(*sizes)
    first.run(0, options.stop_at)
    with tempfile.TemporaryDirectory() as folder:
        first.save(Path(folder) / "training.pt", options.stop_at)
        second = Training(*sizes)
        step = second.load(Path(folder) / "training.pt")
    print(f"stopped after step {step}, goes on {second.schedule.phase}")
    print(f"in two parts: loss {second.run(step, options.steps):.6f}")

    ours, theirs = whole.weights(), second.weights()
    if not all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items()):
        raise SystemExit("the two runs differ")
    print("all weights are equal, bit for bit")


if __name__ == "__main__":
    main()
