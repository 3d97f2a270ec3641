"""2:4 training in the Trainer of Lightning."""

from typing import Any

from semisparse.errors import ConfigError, ScheduleError
from semisparse.integrations.hosts import missing
from semisparse.integrations.run import AtEnd, Names, TrainerRun
from semisparse.recipes.recipe import Recipe
from semisparse.recipes.recipe_schedule import RecipeSchedule
from semisparse.schedule.step_packing import Pack

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise missing(__name__, "lightning", error) from error

from torch import nn

__all__ = ["SparseCallback"]


class SparseCallback(Callback):
    """Trains a LightningModule with a recipe, and hands over a dense one: Trainer(callbacks=[SparseCallback()]).

    The selected layers are made semi-sparse before Lightning wraps the model (in on_fit_start if configure_model builds
    it), unless it has semi-sparse layers already. The recipe starts with the training loop, and the layers are made
    dense after it. Accumulated batches and steps that Lightning's gradient scaler skipped do not count. Checkpoints are
    the dense model's, with the schedule's state among those of the callbacks; a checkpoint without one is continued at
    trainer.global_step. "semisparse/sparse" (1 or 0) and "semisparse/applied_steps" are logged.

    Args:
        recipe: What trains how; None for recipes.safest().
        select: As sparsify's: a string or a list of strings.
        exclude: As sparsify's: a string or a list of strings.
        at_end: As the argument of densify, or None to leave layers and recipe as they are.
        pack: As SparseSchedule's.
        seed: As SparseSchedule's.

    Raises:
        ConfigError: An argument is not one of its values; or, when training starts, the Trainer does not know how many
            steps the run will have, has no optimizer that fits, or computes gradients too late for the recipe (those
            with a decay, and step, need precision="16-mixed").
        ScheduleError: During training: one callback in two Trainers at once, or a checkpoint of another recipe or
            number of steps. Two in one Trainer are refused by Lightning itself.
    """

    def __init__(
        self,
        recipe: Recipe | None = None,
        *,
        select: Names = None,
        exclude: Names = None,
        at_end: AtEnd | None = "dense",
        pack: Pack = "each_forward",
        seed: int = 0,
    ) -> None:
        self._run = TrainerRun(recipe, select, exclude, at_end, pack, seed)
        self._saved: dict[str, Any] | None = None
        self._trainer: Any = None
        self._seen = 0

    @property
    def schedule(self) -> RecipeSchedule | None:
        """The schedule of the current or the last run; None before the first."""
        return self._run.schedule

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Swap the layers, if there are any yet."""
        self._saved = None
        if stage == "fit" and any(isinstance(module, nn.Linear) for module in pl_module.modules()):
            self._run.swap(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Swap the layers that configure_model has built."""
        self._run.swap(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the recipe, or continue it; a checkpoint was loaded before."""
        recipe, scaler = self._run.recipe, getattr(trainer.precision_plugin, "scaler", None)
        if scaler is None and (recipe.decay or recipe.dense_range):
            raise ConfigError(
                f"recipe={recipe.name} needs gradients before optimizer.step, but Lightning steps with a closure "
                "unless precision='16-mixed': use safest, fastest, dinov2, s_ste, or fst with decay=0"
            )
        self._run.start(pl_module, trainer.optimizers, trainer.estimated_stepping_batches)
        self._run.resume(self._saved, trainer.global_step)
        self._saved, self._trainer, self._seen = None, trainer, trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the step that ended with this batch, unless the scaler skipped it."""
        if trainer is not self._trainer:
            raise ScheduleError("this SparseCallback runs in another Trainer, too; give each Trainer its own")
        if trainer.global_step == self._seen:
            return  # gradients are being accumulated
        self._seen = trainer.global_step
        self._run.running().step(getattr(trainer.precision_plugin, "scaler", None))
        pl_module.log_dict(self._run.log())

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the layers dense."""
        if trainer is self._trainer:
            self._run.end(pl_module)
        self._trainer = None

    def state_dict(self) -> dict[str, Any]:
        """The schedule's state, for Lightning's checkpoints."""
        return self._run.state_dict() or {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state of a checkpoint until training starts."""
        self._saved = state_dict
