"""A running recipe: the schedule of its phases, and the state of all its parts."""

from typing import Any, NoReturn, SupportsIndex

import torch
from torch import nn

from semisparse.errors import ScheduleError
from semisparse.nn.pack_together import Keep
from semisparse.recipes.auto_switch import AutoSwitch
from semisparse.recipes.decay import MaskedDecay
from semisparse.recipes.held import Held
from semisparse.recipes.parts import HOOKED, dense_then_sparse, parts_of, phases_of
from semisparse.recipes.recipe import Recipe
from semisparse.schedule.phases import Phase, checked_state
from semisparse.schedule.ranks import Group, agree, attempt, digest
from semisparse.schedule.sparse_schedule import SparseSchedule
from semisparse.schedule.step_packing import Pack
from semisparse.surgery.layers import layers_with_masks


class RecipeSchedule(SparseSchedule):
    """The SparseSchedule of a Recipe; stepped, saved and loaded like every schedule.

    The recipe starts at once: masks and scales are taken from the weights, and decay is added to the optimizer as a
    step hook. step() also refreshes held masks and decides whether the dense phase of `step` ends. A step that the
    scaler skipped changes nothing.

    state_dict() holds all of the recipe's state: the counter, held masks and their age, held scales, and what
    AutoSwitch has measured. Loading it, together with the states of model and optimizer, continues bit for bit. Save it
    with torch.save, because it contains tensors. The object itself cannot be copied or pickled, because hooks of an
    optimizer cannot. A copy of the model that follows the schedule shares masks and scales; other copies keep theirs.

    Args:
        recipe: The settings.
        model: Layers swapped with recipe.config, on its final device, with its weights loaded. Layers with another
            grad_output or precision keep theirs; a warning is logged. Layers that do not prune the weight follow the
            phases, and nothing else of the recipe.
        optimizer: Any torch optimizer that holds the sparse weights that train, or a wrapper of one; StepAdamW if
            recipe.dense_range is given.
        total_steps: Optimizer steps of the whole run.
        process_group: As for SparseSchedule. Held masks and scales are also compared, at the start and whenever masks
            are refreshed.
        pack: As for SparseSchedule.
        keep: As for SparseSchedule.
        seed: As for SparseSchedule.

    Raises:
        NoLayerMatchedError: model has no SemiSparseLinear.
        ConfigError: Layers or optimizer do not fit the recipe, or the optimizer still has the hooks of another recipe.
        ScheduleError: total_steps does not fit. Later also raised by step() after finish(), and if AutoSwitch has not
            seen an optimizer step.
        LayerRefusedError: The recipe must read weights, but one is sharded or on the meta device.
        RankMismatchError: The ranks hold different layers, settings, masks or scales.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        total_steps: int,
        *,
        process_group: Group = None,
        pack: Pack = "each_forward",
        keep: Keep = "both",
        seed: int = 0,
    ) -> None:
        self._group = process_group

        def prepare() -> int:
            self._parts = parts_of(recipe, model, optimizer, total_steps)
            self._finished = False
            self._prepare(model, self._parts.phases, None, pack, keep, seed)
            return self._digest()

        # Everything that can fail comes before the first change of the model or the optimizer.
        agree(attempt(prepare), process_group)
        self._begin()
        inner, held, switch = self._parts.optimizer, self._parts.held, self._parts.switch
        self._decay = MaskedDecay(model, inner, recipe.decay) if recipe.decay else None
        if switch is not None:
            switch.attach()
        if self._decay is not None or switch is not None:
            HOOKED[inner] = recipe.name
        for layer in layers_with_masks(model).values():  # what an earlier recipe may have left
            layer.hold()
        if held is not None:
            held.attach()
        self.refresh()

    def _digest(self) -> int:
        tensors = {} if self._parts.held is None else self._parts.held.tensors
        return digest((super()._digest(), self.recipe.describe(), self._parts.total_steps), tensors)

    @classmethod
    def sparse_then_dense(cls, *args: Any, **kwargs: Any) -> NoReturn:
        """Not for recipes; always raises ScheduleError."""
        raise ScheduleError("a recipe has its own phases: RecipeSchedule(recipes.dinov2(sparse_fraction=...), ...)")

    @classmethod
    def dense_sparse_dense(cls, *args: Any, **kwargs: Any) -> NoReturn:
        """Not for recipes; always raises ScheduleError."""
        raise ScheduleError("a recipe has its own phases; for others use SparseSchedule.dense_sparse_dense")

    @property
    def recipe(self) -> Recipe:
        """The recipe that runs."""
        return self._parts.recipe

    def _check_layers(self) -> None:
        self._check_running()
        super()._check_layers()

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The phases in order; with AutoSwitch those for the latest possible switch, until it has come."""
        return self._phases

    def _advance(self) -> None:
        held, switch = self._parts.held, self._parts.switch
        if switch is not None:
            switch.check_seen()
        super()._advance()
        if switch is not None and switch.count(self._applied_steps):
            self._phases = dense_then_sparse(self._applied_steps, self._parts.total_steps)
            self._apply()
        if held is not None and held.advance(self.phase == "sparse"):
            self._layers.adopt_copies()
            agree(self._digest(), self._group)

    def resume_at(self, applied_steps: int) -> None:
        """As SparseSchedule.resume_at, for recipes whose only state is the counter.

        Raises:
            ScheduleError: The recipe has more state, or has ended, or applied_steps is not a number of steps.
        """
        self._check_running()
        if not self.recipe.counts_only:
            raise ScheduleError(
                f"the recipe {self.recipe.name} has more state than a counter: save state_dict() and load it instead"
            )
        super().resume_at(applied_steps)

    def end_sparse_phase(self) -> None:
        """As SparseSchedule.end_sparse_phase; decay ends, and masks, scales and a frozen variance stay.

        Raises:
            ScheduleError: As SparseSchedule.end_sparse_phase, or the recipe has ended.
            RankMismatchError: As SparseSchedule.end_sparse_phase.
        """
        self._check_running()
        super().end_sparse_phase()

    def finish(self) -> None:
        """End the recipe: remove hooks from the optimizer, and held masks or scales from the layers.

        For a model that continues to train without the recipe. Layers stay sparse or dense, and sparse ones choose
        their mask at every forward again. densify removes held tensors by itself. With mask "soft" call finish() after
        densify: without its scale a layer cannot run.
        """
        if self._finished:
            return
        self._finished = True
        self._packing.close()
        self._seeds.release()
        for part in self._stateful():
            part.detach()
        self._layers.release_followers()
        if self._decay is not None:
            self._decay.remove()
        if self._decay is not None or self._parts.switch is not None:
            HOOKED.pop(self._parts.optimizer, None)

    def state_dict(self) -> dict[str, Any]:
        """As SparseSchedule.state_dict, with settings and state of the recipe; tensors are copies on their devices."""
        state = {**super().state_dict(), **self._settings()}
        for part in self._stateful():
            state |= part.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where state was saved, also in mid-phase.

        Also load the optimizer's state, which has the frozen variance of StepAdamW.

        Raises:
            ScheduleError: state is of another kind, or of another recipe, model or number of steps; nothing is changed.
        """
        self._check_running()
        if not isinstance(state, dict):
            raise ScheduleError(f"state is a {type(state).__name__}; pass what state_dict() returned")
        for name, ours in self._settings().items():
            if state.get(name) != ours:
                raise ScheduleError(
                    f"state was saved with {name}={state.get(name)!r}, this schedule has {ours!r}; start it with the "
                    "same to resume"
                )
        for part in self._stateful():
            part.check_state(state)
        phases = phases_of(self.recipe, self._parts.total_steps)
        if self._parts.switch is not None and state["switched_at"] is not None:
            phases = dense_then_sparse(state["switched_at"], self._parts.total_steps)
        self._restore(checked_state(state, phases))
        for part in self._stateful():
            part.load_state_dict(state)
        self._apply()
        self.refresh()

    def _settings(self) -> dict[str, Any]:
        """What a state and the schedule that loads it must have in common."""
        return {"recipe": self.recipe.describe(), "total_steps": self._parts.total_steps}

    def _stateful(self) -> list[Held | AutoSwitch]:
        """The parts of the recipe that have state."""
        return [part for part in (self._parts.held, self._parts.switch) if part is not None]

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise ScheduleError(
            f"the running recipe {self.recipe.name} cannot be copied or pickled, because hooks of optimizers are not; "
            "save state_dict() and load it into a RecipeSchedule of the copies"
        )

    def _check_running(self) -> None:
        if self._finished:
            raise ScheduleError(f"finish() has ended the recipe {self.recipe.name}; start a new RecipeSchedule")
