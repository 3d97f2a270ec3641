"""2:4 training in torchtitan 0.3: a converter of model configs, and a hook that steps the schedule.

    spec = model_registry("8B", converters=[SemiSparseConverter.Config()])
    spec = ScheduleHook(recipe=recipe).attach(spec)  # model_spec of your Trainer.Config

torchtitan calls converters before the model is built, and the hook once its optimizers are. It has no gradient scaler,
so each optimizer step counts.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import nn

from semisparse.config import SparseConfig
from semisparse.errors import ConfigError, NoLayerMatchedError, ScheduleError
from semisparse.formats.layout import SPARSE_MULTIPLE
from semisparse.integrations.hosts import missing
from semisparse.integrations.run import TrainerRun
from semisparse.nn import SemiSparseLinear
from semisparse.recipes.recipe import Recipe
from semisparse.recipes.recipe_schedule import RecipeSchedule
from semisparse.schedule.ranks import Group
from semisparse.schedule.step_packing import Pack
from semisparse.surgery.roles import role_of_name
from semisparse.surgery.selection import closest, text_matches

try:
    from torchtitan.models.common.linear import Linear
    from torchtitan.protocols.model import ModelConfigConverter
    from torchtitan.protocols.module import Module
except ImportError as error:
    raise missing(__name__, "torchtitan==0.3.0", error) from error

__all__ = ["ScheduleHook", "SemiSparseConverter"]

logger = logging.getLogger(__name__)


class SparseLinear(SemiSparseLinear, Linear):
    """torchtitan's Linear with a pruned weight; initialised, sharded and saved as Linear is.

    Args:
        config: The fields of Linear.Config, and the settings of the semi-sparse layer.
    """

    operand = "weight"
    _dense_class = Linear
    _swapped_base = SemiSparseLinear

    @dataclass(kw_only=True, slots=True)
    class Config(Linear.Config):
        """Builds a SparseLinear in the place of a Linear."""

        sparse: SparseConfig = field(default_factory=SparseConfig)

    def __init__(self, config: Config) -> None:
        Linear.__init__(self, config)
        self._set_config(config.sparse)


class SemiSparseConverter(ModelConfigConverter):
    """Replaces the Linear.Config nodes of a model by SparseLinear.Config; give its Config to model_registry.

    Nodes of other converters (float8, LoRA) stay as they are. Those for float8 and MX replace every Linear, also a
    sparse one, unless their settings name others: put this one after them, and before LoRAConverter. Layers whose sizes
    are not multiples of 16 stay dense.

    Args:
        config: The settings.

    Raises:
        NoLayerMatchedError: An entry of select matches no Linear, or nothing would change.
        ConfigError: sparse does not prune the weight.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(ModelConfigConverter.Config):
        """Settings of the layers, and which: select and exclude are substrings or globs of their names, as sparsify's.

        Without select, layers whose name says output head (lm_head) or adapter stay dense.
        """

        sparse: SparseConfig = field(default_factory=SparseConfig)
        select: list[str] = field(default_factory=list)
        exclude: list[str] = field(default_factory=list)

    def __init__(self, config: Config) -> None:
        self.config = config
        if config.sparse.operand != "weight":
            raise ConfigError(f"sparse={config.sparse!r} does not prune the weight: set weight='transposable'")

    def convert(self, model_config: Module.Config) -> Module.Config:
        """Replace the selected nodes.

        Args:
            model_config: The config of a model, which is changed in place.

        Returns:
            model_config, or the replacement if it is itself a Linear's.
        """
        nodes = list(model_config.traverse(Linear.Config))
        names = [name for name, *_ in nodes]
        for text in self.config.select:
            if not any(text_matches(text, name) for name in names):
                raise NoLayerMatchedError(f"select: {text!r} matches no Linear; closest names: {closest(text, names)}")
        skipped = {name: self._why_dense(name, node) for name, node, *_ in nodes}
        if all(skipped.values()):
            raise NoLayerMatchedError(f"no Linear of the model would change: {skipped}")
        for name, node, parent, place in nodes:
            if reason := skipped[name]:
                logger.info("%s stays dense: %s", name, reason)
                continue
            settings = {f.name: getattr(node, f.name) for f in fields(node) if f.init}
            sparse = SparseLinear.Config(**settings, sparse=self.config.sparse)
            if parent is None:
                model_config = sparse
            elif isinstance(parent, list):
                parent[place] = sparse
            else:
                setattr(parent, place, sparse)
        return model_config

    def _why_dense(self, name: str, node: Any) -> str | None:
        """Why the Linear with this name stays dense, or None."""
        if type(node) is not Linear.Config:
            return f"its config is a {type(node).__qualname__}, another converter's"
        if self.config.select and not any(text_matches(text, name) for text in self.config.select):
            return "not selected"
        if any(text_matches(text, name) for text in self.config.exclude):
            return "excluded"
        if not self.config.select and (role := role_of_name(name)):
            return role
        if node.in_features % SPARSE_MULTIPLE or node.out_features % SPARSE_MULTIPLE:
            return f"its sizes {node.out_features} x {node.in_features} are not multiples of {SPARSE_MULTIPLE}"
        return None


class ScheduleHook:
    """Starts a recipe once torchtitan has built its optimizers, and counts their steps.

    torchtitan's checkpoints have no place for a schedule. When one is loaded, the hook goes on at the number of steps
    that the optimizer has counted (Adam's and AdamW's state has it). Where no optimizer counts (only DistMuon), or the
    optimizer is not loaded (checkpoint.exclude_from_loading), call resume_at(trainer.step) after loading. The resumed
    run needs the same training.steps.

    Args:
        total_steps: training.steps of the run; None takes it from there, which needs attach.
        recipe: What trains how; None for recipes.safest(). Its config must be the converter's.
        before: A post_optimizer_build_fn that is called first; attach puts the model's own there.
        pack: As SparseSchedule's.
        seed: As SparseSchedule's.

    Raises:
        ConfigError: The recipe has more state than a counter; or, when the trainer is built, total_steps is not
            training.steps, the model is trained with tensor parallelism, for which packed products have no rule, or
            from CUDA graphs, which would go on with the products of the first phase.
        ScheduleError: It is called for a second trainer, or a step is done after a checkpoint without a count.
    """

    def __init__(
        self,
        total_steps: int | None = None,
        recipe: Recipe | None = None,
        *,
        before: Callable[[Any, list[nn.Module], Any], None] | None = None,
        pack: Pack = "each_forward",
        seed: int = 0,
    ) -> None:
        self._run = TrainerRun(recipe, None, None, None, pack, seed)
        self._total_steps, self._before = total_steps, before
        self._attached = self._graphs = self._lost = False
        if not self._run.recipe.counts_only:
            raise ConfigError(
                f"recipe={self._run.recipe.name} has more state than a counter, which torchtitan's checkpoints do not "
                "hold: use safest, fastest, dinov2 or sr_ste"
            )

    @property
    def schedule(self) -> RecipeSchedule | None:
        """The schedule; None before torchtitan has built its optimizers."""
        return self._run.schedule

    def attach(self, spec: Any) -> Any:
        """A copy of a model's spec whose trainer calls this hook, with the settings of its training.

        The command line may change training.steps after spec was made; the hook gets what holds in the end.

        Args:
            spec: What model_registry returns.

        Raises:
            NoLayerMatchedError: The model has no semi-sparse layer (left).
            ScheduleError: spec has a ScheduleHook already.
        """
        if next(spec.model.traverse(SparseLinear.Config), None) is None:
            raise NoLayerMatchedError(
                f"spec={spec.name} {spec.flavor} has no semi-sparse layer: pass SemiSparseConverter.Config() to "
                "model_registry, after converters for float8 and the like, which replace every Linear"
            )
        if isinstance(spec.post_optimizer_build_fn, ScheduleHook):
            raise ScheduleError("spec has a ScheduleHook already: attach one to each spec")
        self._before = self._before or spec.post_optimizer_build_fn
        self._attached = True
        return replace(spec, parallelize_fn=self._noting(spec.parallelize_fn), post_optimizer_build_fn=self)

    def _noting(self, parallelize: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        """Parallelize, but first read the settings of the training, which nothing else of a spec is given."""

        def parallelize_noted(model: nn.Module, *, parallel_dims: Any, training: Any, **settings: Any) -> nn.Module:
            _refuse_tensor_parallelism(parallel_dims)
            if self._total_steps not in (None, training.steps):
                raise ConfigError(
                    f"total_steps={self._total_steps} of the ScheduleHook is not training.steps={training.steps}: "
                    "leave total_steps out"
                )
            self._total_steps = training.steps
            # As torchtitan decides it.
            self._graphs = not training.disable_cuda_graphs and torch.cuda.is_available() and torch.version.hip is None
            return parallelize(model, parallel_dims=parallel_dims, training=training, **settings)

        return parallelize_noted

    def __call__(self, optimizers: Any, model_parts: list[nn.Module], parallel_dims: Any) -> None:
        """Start the recipe; torchtitan calls this."""
        if self._run.schedule is not None:
            raise ScheduleError("this ScheduleHook runs in another trainer already; give each trainer its own")
        _refuse_tensor_parallelism(parallel_dims)
        if self._before is not None:
            self._before(optimizers, model_parts, parallel_dims)
        if self._attached and self._total_steps is None:
            return  # a seed checkpoint is written: nothing was parallelized, and nothing is trained
        if self._total_steps is None:
            raise ConfigError("total_steps=None: add the hook by ScheduleHook.attach(spec), or pass training.steps")
        # Ranks of a pipeline hold different layers, so that there is nothing to compare.
        group: Group = False if getattr(parallel_dims, "pp_enabled", False) else None
        schedule = self._run.start(nn.ModuleList(model_parts), [optimizers], self._total_steps, group)
        if sum(phase.steps > 0 for phase in schedule.phases) > 1:
            self._refuse_graphs(parallel_dims)
        for optimizer in optimizers:
            optimizer.register_load_state_dict_post_hook(lambda _: self._go_on(optimizers))
        optimizers.register_step_pre_hook(lambda *_: self._refuse_lost())
        optimizers.register_step_post_hook(lambda *_: schedule.step())

    def resume_at(self, step: int) -> None:
        """Continue after this many steps; for checkpoints from which the hook cannot read it.

        Raises:
            ScheduleError: step is not a number of steps, or no run has started.
        """
        self._run.running().resume_at(step)
        self._lost = False

    def _go_on(self, optimizers: Any) -> None:
        """After one of the optimizers was loaded; the last one settles it, as all of them are loaded then."""
        states = [state for optimizer in optimizers for state in optimizer.state.values()]
        counts = [int(state["step"]) for state in states if "step" in state]
        if counts:
            self.resume_at(max(counts))  # a weight without gradients counts fewer
        self._lost = not counts

    def _refuse_lost(self) -> None:
        if self._lost:
            raise ScheduleError(
                "a checkpoint was loaded whose optimizers do not count their steps: call "
                "ScheduleHook.resume_at(trainer.step) after loading, as in Trainer.load_state_dict"
            )

    def _refuse_graphs(self, parallel_dims: Any) -> None:
        if self._graphs:
            raise ConfigError(
                "training.disable_cuda_graphs=False: a recorded graph would go on with the products of the first "
                "phase when the next one begins: set --training.disable_cuda_graphs"
            )
        if parallel_dims is not None and not self._attached and torch.cuda.is_available():
            raise ConfigError(
                "post_optimizer_build_fn: the hook cannot see training.disable_cuda_graphs from there, and a recorded "
                "graph would go on with the products of the first phase: add it by ScheduleHook.attach(spec)"
            )


def _refuse_tensor_parallelism(parallel_dims: Any) -> None:
    if getattr(parallel_dims, "tp_enabled", False):
        raise ConfigError("parallelism.tensor_parallel_degree: 2:4 layers have no rule for it; use data parallelism")
