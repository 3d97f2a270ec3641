"""A user's program in full types: `make check` holds it to mypy --strict, `make pyright` to pyright's strict mode."""

from collections.abc import Mapping
from pathlib import Path
from typing import assert_type

import torch
from torch import Tensor, nn

import semisparse
from semisparse import recipes


class Block(nn.Module):
    """Two linear layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(nn.functional.gelu(self.up(x)))
        return y


def new_model() -> nn.Sequential:
    return nn.Sequential(Block(16), Block(16))


def wide(name: str, layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) and layer.in_features > 16


def swap() -> nn.Sequential:
    model = new_model()
    report = assert_type(semisparse.sparsify(model, exclude="1.up"), semisparse.SwapReport)
    assert_type(report.swapped, tuple[str, ...])
    reasons: Mapping[str, str] = report.skipped
    assert reasons["1.up"] == "excluded"
    for name, layer in semisparse.semi_sparse_layers(model).items():
        assert_type(layer.sparse_config, semisparse.SparseConfig)
        assert_type(layer.sparse_enabled, bool)
        assert name in report.swapped
    assert len(semisparse.sparsify(new_model(), select=[wide, "0.up"]).swapped) == 3
    sampled = semisparse.SparseConfig(grad_output="mvue")
    assert dict(semisparse.sparsify(new_model(), {"0.up": sampled}).configs) == {"0.up": sampled}
    return model


def train(model: nn.Module, steps: int) -> semisparse.SparseSchedule:
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = semisparse.SparseSchedule.sparse_then_dense(model, total_steps=steps, sparse_fraction=0.5)
    metrics = semisparse.MaskMetrics(model, interval=2)
    for _ in range(steps):
        with semisparse.reuse_packed(model):
            loss: Tensor = model(torch.randn(8, 16)).square().mean()
            torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        if assert_type(schedule.step(), bool):
            metrics.update()
    assert schedule.phase == "dense"
    schedule.load_state_dict(schedule.state_dict())
    assert_type(schedule.applied_steps, int)
    return schedule


def train_with_a_recipe() -> None:
    model, recipe = new_model(), recipes.safest()
    semisparse.sparsify(model, recipe.config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = recipes.RecipeSchedule(recipe, model, optimizer, total_steps=4)
    schedule.step()
    schedule.finish()


def look(model: nn.Module, folder: Path) -> None:
    report = semisparse.check(model, torch.randn(8, 16))
    assert assert_type(report.ok, bool)
    rows: list[str] = [f"{row.name}: {row.forward}" for row in report]
    assert len(rows) == 3
    try:
        semisparse.plan(model, torch.randn(8, 16), mode="compiled").save(folder / "plan.json")
    except semisparse.errors.PlanError as error:  # no GPU here, or layers that were swapped already
        print(error)
    try:
        weights: list[str] = [weight.name for weight in semisparse.check_checkpoint(folder) if weight.axis == "both"]
        print(weights)
    except semisparse.errors.CheckpointError as error:
        print(error)


def misuse() -> None:
    """What a type checker must refuse; an unused ignore is an error, and so is a package without types."""
    try:
        semisparse.SparseConfig(precision="fp16")  # type: ignore[arg-type]
    except semisparse.errors.ConfigError:
        return
    raise AssertionError("a wrong precision was accepted")


def main() -> None:
    model = swap()
    look(model, Path("no-such-folder"))
    train(model, 4)
    semisparse.densify(model, weights="masked")
    train_with_a_recipe()
    layer = semisparse.SemiSparseLinear.from_dense(nn.Linear(16, 16))
    semisparse.SemiSparseLinear.to_dense(layer)
    misuse()


if __name__ == "__main__":
    main()
