"""Every row is trained by one path, and ends as a plain model."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from lab.tests.toys import MODEL, TRAIN, kept_per_group, sparse_row, toy_data, train_toy
from semisparse import SparseSchedule, densify, recipes
from semisparse.recipes import StepAdamW
from semisparse_lab.experiment import Row, sparsify_model, train_row
from semisparse_lab.models.vit import build_model
from semisparse_lab.tasks.classification import ImageClassification
from semisparse_lab.train.loop import fit


@pytest.mark.parametrize("fraction", [0.0, 0.7, 1.0])
def test_dinov2_is_a_plain_sparse_schedule_bit_for_bit(fraction: float) -> None:
    task, model = ImageClassification(toy_data()), build_model(MODEL, TRAIN.seed)
    sparsify_model(model, TRAIN.layers)
    schedule = SparseSchedule.sparse_then_dense(model, 15, fraction)
    result = fit(model, task, TRAIN, schedule)
    densify(model, weights="masked" if schedule.phase == "sparse" else "dense")
    run = train_toy(sparse_row(fraction), task)
    assert run.result.epochs == result.epochs and run.result.test == result.test
    assert all(torch.equal(tensor, run.model.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_samples_of_the_gradient_follow_the_seed_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = []
    monkeypatch.setattr(
        "semisparse_lab.experiment.fit",
        lambda model, *args, **options: keys.append(model.blocks[0].mlp.fc1.held_seed) or fit(model, *args, **options),
    )
    row = Row("fst", "fst", recipes.fst(grad_output="mvue"))
    for seed in (0, 0, 1):
        train_row(row, build_model(MODEL, 0), ImageClassification(toy_data()), replace(TRAIN, seed=seed, epochs=1))
    assert keys[0] == keys[1] != keys[2]


@pytest.mark.parametrize("name", recipes.PRESETS)
def test_every_recipe_trains_and_leaves_a_plain_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    optimizers = []
    monkeypatch.setattr(
        "semisparse_lab.experiment.RecipeSchedule",
        lambda *args, **options: optimizers.append(args[2]) or recipes.RecipeSchedule(*args, **options),
    )
    model = build_model(MODEL, TRAIN.seed)
    row = Row(name, name, recipes.PRESETS[name]())
    result = train_row(row, model, ImageClassification(toy_data()), TRAIN).result
    assert {type(module) for module in model.modules() if isinstance(module, nn.Linear)} == {nn.Linear}
    kinds = [phase.kind for phase in result.phases]
    then_dense = name in ("safest", "fastest", "dinov2", "fst")
    assert kinds == (["sparse", "dense"] if then_dense else ["dense", "sparse"] if name == "step" else ["sparse"])
    pruned = kept_per_group(model.blocks[0].mlp.fc1.weight.detach()).max() <= 2
    assert bool(pruned) is (kinds[-1] == "sparse")
    assert isinstance(optimizers[0], StepAdamW) is (name == "step")
    assert result.test.accuracy > 0.4  # four classes
