"""What the callbacks of all trainers have in common: swap, schedule, resume, and the end of a run."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from semisparse.config import SparseConfig
from semisparse.errors import ConfigError, LayerRefusedError, ScheduleError
from semisparse.nn.refusals import bound_sparse
from semisparse.recipes.presets import safest
from semisparse.recipes.recipe import Recipe
from semisparse.recipes.recipe_schedule import RecipeSchedule
from semisparse.schedule.phases import kind_at
from semisparse.schedule.ranks import Group
from semisparse.schedule.step_packing import Pack
from semisparse.surgery.densify import densify
from semisparse.surgery.layers import semi_sparse_layers
from semisparse.surgery.swap import sparsify

logger = logging.getLogger(__name__)

AtEnd = Literal["dense", "masked"]
Names = str | Sequence[str] | None
_AT_END = ("dense", "masked", None)


class TrainerRun:
    """One training run inside another package's trainer.

    Args:
        recipe: As SparseCallback's; None for recipes.safest().
        select: As sparsify's, but strings only.
        exclude: As sparsify's, but strings only.
        at_end: What happens to the layers after the last step: as the argument of densify, or None for nothing.
        pack: As SparseSchedule's.
        seed: As SparseSchedule's.

    Attributes:
        schedule: The schedule; None before the run starts.

    Raises:
        ConfigError: An argument is not one of its values.
    """

    def __init__(
        self, recipe: Recipe | None, select: Names, exclude: Names, at_end: AtEnd | None, pack: Pack, seed: int
    ) -> None:
        self.recipe = safest() if recipe is None else recipe
        if not isinstance(self.recipe, Recipe):
            raise ConfigError(f"recipe={recipe!r} must be a Recipe, such as semisparse.recipes.safest()")
        if at_end not in _AT_END:
            raise ConfigError(f"at_end={at_end!r} is not one of {', '.join(map(repr, _AT_END))}")
        self.select, self.exclude = _names(select, "select"), _names(exclude, "exclude")
        self.at_end, self.pack, self.seed = at_end, pack, seed
        self.schedule: RecipeSchedule | None = None
        self._active = False

    def swap(self, model: nn.Module) -> None:
        """Make the selected layers of model semi-sparse, unless it has semi-sparse layers already.

        Raises:
            NoLayerMatchedError, LayerRefusedError: As sparsify.
        """
        if not semi_sparse_layers(model):
            report = sparsify(model, self.recipe.config, select=self.select, exclude=self.exclude)
            logger.info("%s", report)

    def start(
        self, model: nn.Module, optimizers: Sequence[Any], total_steps: object, process_group: Group = None
    ) -> RecipeSchedule:
        """Start the recipe on a model that was swapped; a run that was broken off ends first.

        Args:
            model: The model.
            optimizers: The trainer's, perhaps in wrappers; the one that holds the sparse weights is taken.
            total_steps: Optimizer steps of the whole run, as the trainer has planned them.
            process_group: As SparseSchedule's.

        Raises:
            ConfigError: The trainer has not planned a number of steps, or the optimizers do not fit.
            LayerRefusedError: at_end is given, and a layer could not be made dense at the end.
        """
        if isinstance(total_steps, float) and total_steps.is_integer():
            total_steps = int(total_steps)
        if not isinstance(total_steps, int) or total_steps < 1:
            raise ConfigError(
                f"total_steps={total_steps!r}: the trainer has no number of steps for the whole run, which a schedule "
                "needs; give it max_steps or a number of epochs"
            )
        if self.at_end is not None:
            for name, layer in semi_sparse_layers(model).items():
                if (reason := bound_sparse(layer)) is not None:
                    raise LayerRefusedError(
                        f"{name} could not be made dense at the end, because {reason}. Or pass at_end=None"
                    )
        if self.schedule is not None:
            self.schedule.finish()
        self.schedule = RecipeSchedule(
            self.recipe,
            model,
            _holding(optimizers, model),
            total_steps,
            process_group=process_group,
            pack=self.pack,
            seed=self.seed,
        )
        self._active = True
        return self.schedule

    def resume(self, saved: Mapping[str, Any] | None, steps: int) -> None:
        """Continue where a checkpoint was saved.

        Args:
            saved: The schedule's state, if the checkpoint has one.
            steps: The trainer's own count, which includes steps that a gradient scaler skipped; used without saved.

        Raises:
            ScheduleError: saved is of another recipe or number of steps; or it is missing, and a number is not enough.
        """
        schedule = self.running()
        if saved is not None:
            schedule.load_state_dict(dict(saved))
        elif steps:
            logger.warning("the checkpoint has no state of a schedule: going on at the trainer's step %d", steps)
            schedule.resume_at(steps)

    def running(self) -> RecipeSchedule:
        """The schedule.

        Raises:
            ScheduleError: No run has started.
        """
        if self.schedule is None or not self._active:
            raise ScheduleError("SparseCallback: no training has started; pass it to the trainer before fit or train")
        return self.schedule

    def log(self) -> dict[str, float]:
        """Values for the trainer's logger; empty while no run is active."""
        if self.schedule is None or not self._active:
            return {}
        return {
            "semisparse/sparse": float(self.schedule.phase == "sparse"),
            "semisparse/applied_steps": float(self.schedule.applied_steps),
        }

    def state_dict(self) -> dict[str, Any] | None:
        """The schedule's state; None before the run starts."""
        return None if self.schedule is None else self.schedule.state_dict()

    def end(self, model: nn.Module) -> None:
        """After the last step: make the layers dense and end the recipe, unless at_end is None."""
        if self.schedule is None or not self._active:
            return
        self._active = False
        planned = sum(phase.steps for phase in self.schedule.phases)
        if self.schedule.phase != (last := kind_at(self.schedule.phases, planned)):
            logger.warning(
                "training ended after %d applied steps of %d, in a %s phase; the schedule ends in a %s one",
                self.schedule.applied_steps, planned, self.schedule.phase, last,
            )  # fmt: skip
        if self.at_end is not None:
            densify(model, self.at_end)
            self.schedule.finish()


def recipe_from(settings: Mapping[str, Any]) -> Recipe:
    """The recipe whose describe() gave settings, perhaps read from JSON."""
    return Recipe(**{**settings, "config": SparseConfig(**settings["config"])})


def _names(value: object, argument: str) -> str | list[str] | None:
    """A selector that can be written to a checkpoint."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, Sequence) and value and all(isinstance(name, str) for name in value):
        return list(value)
    raise ConfigError(
        f"{argument}={value!r} must be a string or a list of strings; for other selectors call sparsify(model, ...) "
        "before the trainer is built, and leave this out"
    )


def _holding(optimizers: Sequence[Any], model: nn.Module) -> Any:
    """The optimizer that holds the first sparse weight that trains, or the only one."""
    if not optimizers:
        raise ConfigError("the trainer has no optimizer; let it build one, or pass one")
    weights = {id(layer.weight) for layer in semi_sparse_layers(model).values() if layer.weight.requires_grad}
    for optimizer in optimizers:
        groups: list[dict[str, list[torch.Tensor]]] = getattr(optimizer, "param_groups", [])
        if any(id(parameter) in weights for group in groups for parameter in group["params"]):
            return optimizer
    return optimizers[0]
