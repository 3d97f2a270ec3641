"""A recipe while it runs: the schedule of its phases, and the state of everything that it holds."""

from typing import Any, NoReturn, SupportsIndex
from weakref import WeakKeyDictionary

import torch
from torch import nn

from semisparse.errors import ConfigError, ScheduleError
from semisparse.nn import SemiSparseLinear
from semisparse.recipes.auto_switch import AutoSwitch
from semisparse.recipes.decay import MaskedDecay
from semisparse.recipes.frozen import Frozen, FrozenMasks, FrozenScales
from semisparse.recipes.layers import check_optimizer, check_whole, layers_by_weight, unwrapped
from semisparse.recipes.recipe import Recipe
from semisparse.recipes.step_adamw import StepAdamW
from semisparse.schedule.phases import Phase, checked_state, share_of
from semisparse.schedule.ranks import Group, agree, attempt, digest
from semisparse.schedule.sparse_schedule import SparseSchedule
from semisparse.surgery.layers import layers_with_masks

# Which recipe has its hooks on an optimizer: those of a second one would decay twice, without anybody noticing.
_HOOKED: WeakKeyDictionary[torch.optim.Optimizer, str] = WeakKeyDictionary()


class RecipeSchedule(SparseSchedule):
    """SparseSchedule of a Recipe, which starts with it; stepped, saved and loaded like every schedule.

    recipe: its settings. model: layers swapped with recipe.config, on its final device, weights loaded: masks and
    scales are frozen, and decay is hooked into the optimizer, now. optimizer: any torch optimizer that holds the sparse
    weights that train, or a wrapper of one; StepAdamW where recipe.dense_range is given. total_steps: optimizer steps
    of the whole run. process_group: as SparseSchedule; held masks and scales are compared, too, now and whenever masks
    are chosen anew.
    Raises NoLayerMatchedError, ConfigError when layers or optimizer do not fit or another recipe still has its hooks on
    the optimizer, ScheduleError for total_steps, LayerRefusedError where a recipe that looks at weights meets a sharded
    or meta one, RankMismatchError; nothing is changed then.

    step() also refreshes what is frozen and looks whether the dense phase should end. A step that the scaler skipped
    changes nothing. It raises ScheduleError after finish(), and where AutoSwitch has seen no optimizer step.

    state_dict() holds all of the recipe's state: the counter, frozen masks with their age, frozen scales, what
    AutoSwitch has seen and when it switched. Loading it, with the model's and the optimizer's own states, continues
    bit for bit. Save with torch.save: the state has tensors. The object itself cannot be copied or pickled, as the
    hooks of an optimizer cannot. A copy of the model that follows shares masks and scales; others keep them as they
    were.
    phases: with AutoSwitch those planned for the latest switch, until it has come.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        total_steps: int,
        *,
        process_group: Group = None,
    ) -> None:
        self._group = process_group

        def prepare() -> int:
            self._prepare_recipe(recipe, model, optimizer, total_steps)
            return self._digest()

        # Everything that can fail comes before the first change of the model or the optimizer.
        agree(attempt(prepare), process_group)
        self._begin()
        self._decay = MaskedDecay(model, self._optimizer, recipe.decay) if recipe.decay else None
        if self._switch is not None:
            self._switch.attach()
        if self._decay is not None or self._switch is not None:
            _HOOKED[self._optimizer] = recipe.name
        for layer in layers_with_masks(model).values():  # what an earlier recipe may have left
            layer.hold()
        if self._frozen is not None:
            self._frozen.attach()

    def _prepare_recipe(
        self, recipe: Recipe, model: nn.Module, optimizer: torch.optim.Optimizer, total_steps: int
    ) -> None:
        if not isinstance(recipe, Recipe):
            raise ConfigError(f"recipe={recipe!r} must be a Recipe, such as semisparse.recipes.dinov2()")
        layers = layers_by_weight(model)
        inner = unwrapped(optimizer)
        _check(recipe, model, inner, layers)
        phases = _phases(recipe, total_steps)
        self._recipe, self._total, self._optimizer = recipe, total_steps, inner
        self._frozen = _frozen(recipe, model, phases)
        self._switch = _switch(recipe, inner, layers, phases)
        self._finished = False
        self._prepare(model, phases, None)

    def _digest(self) -> int:
        tensors = {} if self._frozen is None else self._frozen.tensors
        return digest((super()._digest(), self._recipe.describe(), self._total), tensors)

    @classmethod
    def sparse_then_dense(cls, *args: Any, **kwargs: Any) -> NoReturn:
        """Not for recipes. Raises ScheduleError."""
        raise ScheduleError("a recipe brings its phases: RecipeSchedule(recipes.dinov2(sparse_fraction=...), ...)")

    @classmethod
    def dense_sparse_dense(cls, *args: Any, **kwargs: Any) -> NoReturn:
        """Not for recipes. Raises ScheduleError."""
        raise ScheduleError("a recipe brings its phases; for others use SparseSchedule.dense_sparse_dense")

    @property
    def recipe(self) -> Recipe:
        """The recipe that was started."""
        return self._recipe

    def _check_layers(self) -> None:
        self._check_running()
        super()._check_layers()

    def _advance(self) -> None:
        if self._switch is not None:
            self._switch.check_seen()
        super()._advance()
        if self._switch is not None and self._switch.count(self._applied_steps):
            self._phases = _dense_then_sparse(self._applied_steps, self._total)
            self._apply()
        if self._frozen is not None and self._frozen.advance(self.phase == "sparse"):
            self._adopt()
            agree(self._digest(), self._group)

    def resume_at(self, applied_steps: int) -> None:
        """As SparseSchedule.resume_at, for recipes whose only state is the counter. Raises ScheduleError for others."""
        self._check_running()
        if self._frozen is not None or self._switch is not None:
            raise ScheduleError(
                f"the recipe {self._recipe.name} holds more than a counter: save state_dict() and load it instead"
            )
        super().resume_at(applied_steps)

    def finish(self) -> None:
        """Take hooks off the optimizer and frozen masks or scales off the layers; for a model that trains on without.

        The recipe has ended then. Layers stay sparse or dense as they are, and a sparse one chooses its mask at every
        forward again. densify takes frozen tensors off by itself. For mask "soft" call finish() after densify: without
        its scale a layer cannot run.
        """
        if self._finished:
            return
        self._finished = True
        for part in (self._switch, self._frozen):
            if part is not None:
                part.detach()
        self._layers.release_followers()
        if self._decay is not None:
            self._decay.remove()
        if self._decay is not None or self._switch is not None:
            _HOOKED.pop(self._optimizer, None)

    def state_dict(self) -> dict[str, Any]:
        """As SparseSchedule.state_dict, with the recipe's settings and state; tensors are copies on their devices."""
        state = {**super().state_dict(), "recipe": self._recipe.describe(), "total_steps": self._total}
        for part in (self._frozen, self._switch):
            if part is not None:
                state |= part.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where state was saved, also in mid-phase. Raises ScheduleError, changing nothing, on a misfit.

        Load the optimizer's state too: the frozen variance of StepAdamW is there.
        """
        self._check_running()
        if not isinstance(state, dict):
            raise ScheduleError(f"state is a {type(state).__name__}; pass what state_dict() returned")
        for name, ours in (("recipe", self._recipe.describe()), ("total_steps", self._total)):
            if state.get(name) != ours:
                raise ScheduleError(
                    f"state was saved with {name}={state.get(name)!r}, this schedule has {ours!r}; start it with the "
                    "same to resume"
                )
        parts = [part for part in (self._frozen, self._switch) if part is not None]
        for part in parts:
            part.check_state(state)
        phases = _phases(self._recipe, self._total)
        if self._switch is not None and state["switched_at"] is not None:
            phases = _dense_then_sparse(state["switched_at"], self._total)
        counted = checked_state(state, phases)
        self._phases, (self._applied_steps, self._evidence.last_scale) = phases, counted
        for part in parts:
            part.load_state_dict(state)
        self._apply()

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise ScheduleError(
            f"the running recipe {self._recipe.name} cannot be copied or pickled, because hooks of optimizers are not; "
            "save state_dict() and load it into a RecipeSchedule of the copies"
        )

    def _check_running(self) -> None:
        if self._finished:
            raise ScheduleError(f"finish() has ended the recipe {self._recipe.name}; start a new RecipeSchedule")


def _check(
    recipe: Recipe, model: nn.Module, optimizer: torch.optim.Optimizer, layers: dict[str, SemiSparseLinear]
) -> None:
    """Raise unless recipe can start with this model and this optimizer."""
    check_optimizer(optimizer, layers)
    for name, layer in layers_with_masks(model).items():
        if layer.sparse_config != recipe.config:
            raise ConfigError(
                f"{name} was swapped with {layer.sparse_config!r}, but the recipe {recipe.name} has {recipe.config!r}: "
                "sparsify with recipe.config"
            )
    if recipe.dense_range is not None and not isinstance(optimizer, StepAdamW):
        raise ConfigError(
            f"optimizer={type(optimizer).__name__} has no variance to freeze; the recipe {recipe.name} needs "
            "semisparse.recipes.StepAdamW"
        )
    if isinstance(optimizer, StepAdamW) and recipe.dense_range is not None and optimizer.variance_frozen:
        raise ConfigError("optimizer: its variance is frozen already; start with a new StepAdamW, then load its state")
    hooks = recipe.decay or recipe.dense_range is not None
    if hooks and optimizer in _HOOKED:
        raise ConfigError(
            f"optimizer still has the hooks of the recipe {_HOOKED[optimizer]}; call finish() of its schedule first"
        )
    if hooks or recipe.refresh_every > 1 or recipe.needs_scale:
        check_whole(layers)


def _frozen(recipe: Recipe, model: nn.Module, phases: tuple[Phase, ...]) -> Frozen | None:
    if recipe.needs_scale:
        return FrozenScales(model)
    if recipe.refresh_every > 1:
        return FrozenMasks(model, recipe.refresh_every, sparse=phases[0].kind == "sparse")
    return None


def _switch(
    recipe: Recipe,
    optimizer: torch.optim.Optimizer,
    layers: dict[str, SemiSparseLinear],
    phases: tuple[Phase, ...],
) -> AutoSwitch | None:
    if recipe.dense_range is None or not isinstance(optimizer, StepAdamW):
        return None
    low, total = recipe.dense_range[0], sum(phase.steps for phase in phases)
    weights = [layer.weight for layer in layers.values() if layer.weight.requires_grad]
    if not weights:
        raise ConfigError(f"the recipe {recipe.name} watches weights that train, but all sparse weights are frozen")
    return AutoSwitch(optimizer, weights, (round(low * total), phases[0].steps))


def _phases(recipe: Recipe, total_steps: int) -> tuple[Phase, ...]:
    if recipe.dense_range is None:
        sparse = share_of(total_steps, recipe.sparse_fraction, "sparse_fraction")
        return Phase("sparse", sparse), Phase("dense", total_steps - sparse)
    latest = share_of(total_steps, recipe.dense_range[1], "dense_range")
    if latest == 0:
        raise ScheduleError(
            f"total_steps={total_steps}: dense_range={recipe.dense_range} leaves no dense step, and so no variance to "
            "freeze; train longer or widen dense_range"
        )
    return _dense_then_sparse(latest, total_steps)


def _dense_then_sparse(at: int, total_steps: int) -> tuple[Phase, ...]:
    return Phase("dense", at), Phase("sparse", total_steps - at)
