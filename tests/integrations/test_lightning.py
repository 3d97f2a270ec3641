"""SparseCallback in the real Trainer of Lightning, on two layers."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from semisparse import recipes
from semisparse.errors import ConfigError, ScheduleError

pytest.importorskip("lightning", minversion="2.6", reason="make test installs it")

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision

from semisparse.integrations.lightning import SparseCallback

pytestmark = pytest.mark.filterwarnings("ignore")  # the host's own, which change with its versions
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
HALF = recipes.safest(sparse_fraction=0.5)
SPARSE, DENSE = ["sparse"] * 4, ["dense"] * 4


class Toy(pl.LightningModule):
    """Two layers, which note the phase of each batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = self.build()
        self.seen: list[str] = []

    def build(self) -> nn.Module:
        return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        self.seen.append("sparse" if self.net[0].sparse_enabled else "dense")
        return (self.net(batch) - batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Late(Toy):
    """Layers that are built when the Trainer asks for them."""

    def build(self) -> nn.Module:
        return nn.Identity()

    def configure_model(self) -> None:
        self.net = super().build()


def fit(model: pl.LightningModule, *callbacks: pl.Callback, resume: Path | None = None, **changes: Any) -> pl.Trainer:
    """Eight steps, each of two batches, which are all the same: then a resumed run sees the same data."""
    settings: dict[str, Any] = {
        "accelerator": "cpu", "max_steps": 8, "accumulate_grad_batches": 2, "logger": False, "barebones": False,
        "enable_progress_bar": False, "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
    }  # fmt: skip
    trainer = pl.Trainer(callbacks=list(callbacks), **(settings | changes))
    row = torch.linspace(-1, 1, 16)
    trainer.fit(model, DataLoader([row] * 32, batch_size=2), ckpt_path=resume)
    return trainer


@pytest.mark.parametrize(
    "recipe", [HALF, recipes.fst(decay=0, refresh_every=2, sparse_fraction=0.5)], ids=lambda recipe: recipe.name
)
def test_a_run_ends_dense_and_resumes_in_mid_phase_bit_for_bit(recipe: recipes.Recipe, tmp_path: Path) -> None:
    whole = Toy()
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1, filename="{step}")
    trainer = fit(whole, SparseCallback(recipe), saver)
    assert whole.seen[::2] == whole.seen[1::2] == SPARSE + DENSE
    assert type(whole.net[0]) is nn.Linear
    assert trainer.logged_metrics["semisparse/applied_steps"] == 8
    resumed = Toy()
    fit(resumed, SparseCallback(recipe), resume=tmp_path / "step=3.ckpt")
    assert resumed.seen[::2] == ["sparse", *DENSE]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(resumed.parameters(), whole.parameters(), strict=True))


def test_checkpoints_that_do_not_fit_are_refused_or_continued_by_their_step(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1, filename="{step}")
    fit(Toy(), SparseCallback(HALF), saver, max_steps=3)
    with pytest.raises(ScheduleError, match="state was saved with recipe="):
        fit(Toy(), SparseCallback(recipes.dinov2()), resume=tmp_path / "step=3.ckpt")
    checkpoint = torch.load(tmp_path / "step=3.ckpt", weights_only=True)
    del checkpoint["callbacks"]["SparseCallback"]
    torch.save(checkpoint, tmp_path / "dense.ckpt")
    model = Toy()
    fit(model, SparseCallback(HALF), resume=tmp_path / "dense.ckpt")
    assert model.seen[::2] == ["sparse", *DENSE]


@pytest.mark.parametrize("recipe", [HALF, recipes.sr_ste(sparse_fraction=0.5)], ids=lambda recipe: recipe.name)
def test_a_step_that_the_scaler_skipped_does_not_count(recipe: recipes.Recipe) -> None:
    class Overflows(Toy):
        def training_step(self, batch: Tensor, index: int) -> Tensor:
            return super().training_step(batch, index) * (torch.inf if index == 2 else 1)

    callback, scaler = SparseCallback(recipe), torch.amp.GradScaler("cpu", init_scale=2.0)
    fit(model := Overflows(), callback, plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)])
    assert callback.schedule is not None
    assert callback.schedule.applied_steps == 7
    assert model.seen[::2].count("sparse") == 5


def test_manual_optimization_counts_its_steps() -> None:
    class Manual(Toy):
        automatic_optimization = False

        def training_step(self, batch: Tensor, index: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, index))
            optimizer.step()

    fit(model := Manual(), SparseCallback(HALF), accumulate_grad_batches=1)
    assert model.seen == SPARSE + DENSE


def test_a_model_that_configure_model_builds_is_swapped_then() -> None:
    fit(model := Late(), SparseCallback(HALF))
    assert model.seen[::2] == SPARSE + DENSE


def test_a_compiled_module_trains_sparse() -> None:
    model = Toy()
    fit(torch.compile(model, backend="eager"), SparseCallback(HALF))
    assert model.seen[::2] == SPARSE + DENSE


def test_a_run_without_a_number_of_steps_is_refused() -> None:
    with pytest.raises(ConfigError, match="give it max_steps or a number of epochs"):
        fit(Toy(), SparseCallback(), max_steps=-1, max_epochs=-1)


@pytest.mark.parametrize("recipe", [recipes.sr_ste(), recipes.step()], ids=lambda recipe: recipe.name)
def test_recipes_that_need_gradients_before_the_step_are_refused_where_lightning_has_none(
    recipe: recipes.Recipe,
) -> None:
    with pytest.raises(ConfigError, match="Lightning steps with a closure"):
        fit(Toy(), SparseCallback(recipe))


def test_one_in_two_trainers_at_once_is_refused() -> None:
    callback = SparseCallback()

    class Inner(pl.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            fit(Toy(), callback, max_steps=1)

    with pytest.raises(ScheduleError, match="another Trainer"):
        fit(Toy(), callback, Inner())
