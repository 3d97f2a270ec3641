"""A recipe while it runs: the schedule of its phases, and the state of everything that it holds."""

from typing import Any

import torch
from torch import nn

from semisparse.errors import ConfigError, ScheduleError
from semisparse.recipes.decay import MaskedDecay
from semisparse.recipes.frozen import Frozen, FrozenMasks, FrozenScales, release
from semisparse.recipes.layers import check_optimizer, layers_by_weight
from semisparse.recipes.recipe import Recipe
from semisparse.recipes.step_adamw import AutoSwitch, StepAdamW
from semisparse.schedule import Phase, SparseSchedule
from semisparse.swap import layers_with_masks


class RecipeSchedule(SparseSchedule):
    """SparseSchedule of a Recipe, which starts with it; stepped, saved and loaded like every schedule.

    recipe: its settings. model: layers swapped with recipe.config, on its final device, weights loaded: masks and
    scales are frozen, and decay is hooked into the optimizer, now. optimizer: any torch optimizer that holds all sparse
    weights; StepAdamW where recipe.dense_range is given. total_steps: optimizer steps of the whole run.
    Raises NoLayerMatched, ConfigError when layers or optimizer do not fit, ScheduleError for total_steps,
    LayerRefused where a recipe that freezes something meets a sharded weight; nothing is changed then.

    state_dict() holds all of the recipe's state: the counter, frozen masks with their age, frozen scales, what
    AutoSwitch has seen and when it switched. Loading it, with the model's and the optimizer's own states, continues
    bit for bit. Save with torch.save: the state has tensors. phases: with AutoSwitch those planned at the latest
    switch, until it has come.
    """

    def __init__(self, recipe: Recipe, model: nn.Module, optimizer: torch.optim.Optimizer, total_steps: int) -> None:
        layers = layers_by_weight(model)
        check_optimizer(optimizer, layers)
        for name, layer in layers_with_masks(model).items():
            if layer.config.mask != recipe.config.mask:
                raise ConfigError(
                    f"{name} was swapped with mask={layer.config.mask!r}, but the recipe {recipe.name} needs "
                    f"{recipe.config.mask!r}: sparsify with recipe.config"
                )
        if recipe.dense_range is not None and not isinstance(optimizer, StepAdamW):
            raise ConfigError(
                f"optimizer={type(optimizer).__name__} has no variance to freeze; the recipe {recipe.name} needs "
                "semisparse.recipes.StepAdamW"
            )
        self._recipe, self._total, self._optimizer = recipe, total_steps, optimizer
        self._switched_at: int | None = None
        super().__init__(model, _phases(recipe, total_steps))
        # Nothing of the model or the optimizer is touched before all checks have passed.
        self._masked_layers = layers_with_masks(model)
        release(self._masked_layers.values())
        self._switch: AutoSwitch | None = None
        if recipe.dense_range is not None and isinstance(optimizer, StepAdamW):
            low, high = (round(share * total_steps) for share in recipe.dense_range)
            self._switch = AutoSwitch(optimizer, layers.values(), (low, high))
        self._decay = MaskedDecay(model, optimizer, recipe.decay) if recipe.decay else None
        self._frozen: Frozen | None = None
        if recipe.config.mask == "soft":
            self._frozen = FrozenScales(model)
        elif recipe.refresh_every > 1:
            self._frozen = FrozenMasks(model, recipe.refresh_every)
        if self._switch is not None and not self._total_before_switch():
            self._go_sparse(0)

    @property
    def recipe(self) -> Recipe:
        """The recipe that was started."""
        return self._recipe

    def step(self, scaler: torch.amp.GradScaler | None = None) -> bool:
        """As SparseSchedule.step; then refresh what is frozen and look whether the dense phase should end.

        A step that the scaler skipped changes nothing.
        """
        if not super().step(scaler):
            return False
        if self._switch is not None and self._switched_at is None and self._switch.due(self._applied_steps):
            self._go_sparse(self._applied_steps)
        if self._frozen is not None:
            self._frozen.advance(self.phase == "sparse")
        return True

    def finish(self) -> None:
        """Take hooks off the optimizer and frozen masks or scales off the layers; for a model that trains on without.

        densify does the second by itself. For mask "soft" call it after densify.
        """
        if self._decay is not None:
            self._decay.remove()
        if self._switch is not None:
            self._switch.finish()
        release(self._masked_layers.values())

    def state_dict(self) -> dict[str, Any]:
        """As SparseSchedule.state_dict, with the recipe's settings and state; tensors are copies on their devices."""
        parts = [part.state_dict() for part in (self._frozen, self._switch) if part is not None]
        state = {**super().state_dict(), "recipe": self._recipe.describe(), "switched_at": self._switched_at}
        for part in parts:
            state |= part
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where state was saved, also in mid-phase. Raises ScheduleError, changing nothing, on a misfit.

        Load the optimizer's state too: the frozen variance of StepAdamW is there.
        """
        if state.get("recipe") != self._recipe.describe():
            raise ScheduleError(
                f"state was saved by the recipe {state.get('recipe')}, this one is {self._recipe.describe()}; "
                "start the same recipe to resume"
            )
        for part in (self._frozen, self._switch):
            if part is not None:
                part.check_state(state)
        switched, planned = state.get("switched_at"), self._phases
        if switched is not None:
            if isinstance(switched, bool) or not isinstance(switched, int) or not 0 <= switched <= self._total:
                raise ScheduleError(f"state['switched_at']={switched!r} must be a step, 0 to {self._total}, or None")
            self._phases = _switched(switched, self._total)
        elif self._switch is not None:
            self._phases = _phases(self._recipe, self._total)
        try:
            super().load_state_dict(state)
        except ScheduleError:
            self._phases = planned
            raise
        self._switched_at = switched
        for part in (self._frozen, self._switch):
            if part is not None:
                part.load_state_dict(state)

    def _total_before_switch(self) -> int:
        return self._phases[0].steps

    def _go_sparse(self, applied: int) -> None:
        self._switched_at = applied
        self._phases = _switched(applied, self._total)
        if isinstance(self._optimizer, StepAdamW):
            self._optimizer.freeze_variance()
        self._apply()


def _phases(recipe: Recipe, total_steps: int) -> tuple[Phase, ...]:
    if isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps < 1:
        raise ScheduleError(f"total_steps={total_steps!r} must be a whole number of steps, 1 or more")
    if recipe.dense_range is not None:
        return _switched(round(recipe.dense_range[1] * total_steps), total_steps)
    sparse = round(recipe.sparse_fraction * total_steps)
    return Phase("sparse", sparse), Phase("dense", total_steps - sparse)


def _switched(at: int, total_steps: int) -> tuple[Phase, ...]:
    return Phase("dense", at), Phase("sparse", total_steps - at)
