"""2:4 training in the Trainer of Hugging Face transformers, and in trainers derived from it (TRL's, for example)."""

from collections.abc import Mapping
from typing import Any
from weakref import WeakSet

from torch import nn

from semisparse.errors import ConfigError, ScheduleError
from semisparse.integrations.hosts import missing
from semisparse.integrations.run import AtEnd, Names, TrainerRun, recipe_from
from semisparse.recipes.recipe import Recipe
from semisparse.recipes.recipe_schedule import RecipeSchedule
from semisparse.schedule.step_packing import Pack

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_callback import ExportableState
except ImportError as error:
    raise missing(__name__, "transformers accelerate", error) from error

__all__ = ["SparseCallback"]

# The callbacks whose trainer is in train().
_TRAINING: "WeakSet[SparseCallback]" = WeakSet()


class SparseCallback(TrainerCallback, ExportableState):
    """Trains the model of a Trainer with a recipe, and hands over a dense one: callbacks=[SparseCallback()].

    When training begins, the selected layers are made semi-sparse, unless the model has semi-sparse layers already, and
    the recipe starts; when it ends, they are made dense. Steps that a gradient scaler skipped do not count. Checkpoints
    are the dense model's, with the state of the schedule in trainer_state.json. Resuming needs no setting: the state is
    read from there, or, if it is not there, state.global_step says where to go on, skipped steps included. With
    restore_callback_states_from_checkpoint=True the Trainer also takes the arguments of the callback from the
    checkpoint. The Trainer's logs get "semisparse/sparse" (1 or 0) and "semisparse/applied_steps".

    Args:
        recipe: What trains how; None for recipes.safest(). Its only state must be a counter, because trainer_state.json
            holds no tensors: not fst, s_ste or step.
        select: As sparsify's: a string or a list of strings.
        exclude: As sparsify's: a string or a list of strings.
        at_end: As the argument of densify, or None to leave layers and recipe as they are.
        pack: As SparseSchedule's.
        seed: As SparseSchedule's.

    Raises:
        ConfigError: An argument is not one of its values, or the recipe has more state than a counter.
        ScheduleError: During training: two of them in one Trainer, one in two Trainers at once, or a checkpoint of
            another recipe or number of steps.
    """

    def __init__(
        self,
        recipe: Recipe | Mapping[str, Any] | None = None,
        *,
        select: Names = None,
        exclude: Names = None,
        at_end: AtEnd | None = "dense",
        pack: Pack = "each_forward",
        seed: int = 0,
    ) -> None:
        recipe = recipe_from(recipe) if isinstance(recipe, Mapping) else recipe  # as state() describes it
        self._run = TrainerRun(recipe, select, exclude, at_end, pack, seed)
        self._trainer_state: TrainerState | None = None
        if not self._run.recipe.counts_only:
            raise ConfigError(
                f"recipe={self._run.recipe.name} has more state than a counter, and trainer_state.json holds no "
                "tensors: use safest, fastest, dinov2 or sr_ste, or the recipe in a loop of your own"
            )

    @property
    def schedule(self) -> RecipeSchedule | None:
        """The schedule of the current or the last run; None before the first."""
        return self._run.schedule

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Swap the layers and start the recipe, or continue it."""
        if any(other is not self and other._trainer_state is state for other in _TRAINING):
            raise ScheduleError("the Trainer has two SparseCallbacks, which would count each step twice; pass one")
        self._run.swap(model)
        self._run.start(model, [] if optimizer is None else [optimizer], state.max_steps)
        if state.global_step:  # else stateful_callbacks may hold the state of an earlier run of this Trainer
            self._run.resume(_saved(state, type(self).__name__), state.global_step)
        # A checkpoint of a run without this callback has no entry, which the Trainer requires when it saves.
        state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        self._trainer_state = state
        _TRAINING.add(self)

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Count the step, unless accelerate says that it was skipped."""
        if state is not self._trainer_state:
            raise ScheduleError("this SparseCallback runs in another Trainer, too; give each Trainer its own")
        skipped = getattr(optimizer, "step_was_skipped", None)
        self._run.running().step(skipped=None if skipped is None else bool(skipped))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add phase and counter to what the Trainer logs."""
        values = self._run.log()
        if logs is not None and "loss" in logs:
            logs.update(values)
            if state.log_history:
                state.log_history[-1].update(values)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Make the layers dense."""
        if state is self._trainer_state and model is not None:
            self._run.end(model)
        self._trainer_state = None
        _TRAINING.discard(self)

    def state(self) -> dict[str, Any]:
        """What the Trainer writes to trainer_state.json: arguments and the schedule's state, as JSON values."""
        run = self._run
        arguments = {
            "recipe": run.recipe.describe(),
            "select": run.select,
            "exclude": run.exclude,
            "at_end": run.at_end,
            "pack": run.pack,
            "seed": run.seed,
        }
        return {"args": arguments, "attributes": {"saved": run.state_dict()}}


def _saved(state: TrainerState, name: str) -> Mapping[str, Any] | None:
    """The schedule's state in a checkpoint that was loaded into state."""
    entry = state.stateful_callbacks.get(name) or {}
    entry = entry[0] if isinstance(entry, list) else entry
    saved: Mapping[str, Any] | None = entry.get("attributes", {}).get("saved")
    return saved
