"""2:4 training in torchtitan 0.3: a converter of model configs, and a hook that steps the schedule.

    hook = ScheduleHook(total_steps=1000)
    spec = model_registry("8B", converters=[SemiSparseConverter.Config()])
    spec = dataclasses.replace(spec, post_optimizer_build_fn=hook)

torchtitan calls converters before the model is built, and the hook once its optimizers are. It has no gradient scaler,
so each optimizer step counts.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

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

    Nodes of other converters (float8, LoRA) stay as they are. With LoRAConverter in the same list, this one comes
    first. Layers whose sizes are not multiples of 16 stay dense.

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
    """A post_optimizer_build_fn that starts a recipe and counts the optimizer steps.

    torchtitan saves the number of its steps and no other state. After a checkpoint was loaded, call resume_at(step).

    Args:
        total_steps: training.steps of the run, which torchtitan does not pass on.
        recipe: What trains how; None for recipes.safest(). Its config must be the converter's.
        before: The post_optimizer_build_fn that the model has already, called first.
        pack: As SparseSchedule's.
        seed: As SparseSchedule's.

    Raises:
        ConfigError: total_steps is not a number of steps, or the recipe has more state than a counter; or, when called,
            the model is trained with tensor parallelism, for which packed products have no rule.
        ScheduleError: It is called for a second trainer.
    """

    def __init__(
        self,
        total_steps: int,
        recipe: Recipe | None = None,
        *,
        before: Callable[[Any, list[nn.Module], Any], None] | None = None,
        pack: Pack = "each_forward",
        seed: int = 0,
    ) -> None:
        self._run = TrainerRun(recipe, None, None, None, pack, seed)
        self._total_steps, self._before = total_steps, before
        if not self._run.recipe.counts_only:
            raise ConfigError(
                f"recipe={self._run.recipe.name} has more state than a counter, which torchtitan's checkpoints do not "
                "hold: use safest, fastest, dinov2 or sr_ste"
            )

    @property
    def schedule(self) -> RecipeSchedule | None:
        """The schedule; None before torchtitan has built its optimizers."""
        return self._run.schedule

    def __call__(self, optimizers: Any, model_parts: list[nn.Module], parallel_dims: Any) -> None:
        """Start the recipe; torchtitan calls this."""
        if self._run.schedule is not None:
            raise ScheduleError("this ScheduleHook runs in another trainer already; give each trainer its own")
        if getattr(parallel_dims, "tp_enabled", False):
            raise ConfigError(
                "parallelism.tensor_parallel_degree: 2:4 layers have no rule for it; use data parallelism"
            )
        if self._before is not None:
            self._before(optimizers, model_parts, parallel_dims)
        # Ranks of a pipeline hold different layers, so that there is nothing to compare.
        group: Group = False if getattr(parallel_dims, "pp_enabled", False) else None
        schedule = self._run.start(nn.ModuleList(model_parts), [optimizers], self._total_steps, group)
        optimizers.register_step_post_hook(lambda *_: schedule.step())

    def resume_at(self, step: int) -> None:
        """Continue after this many steps; call it once the trainer has loaded a checkpoint.

        Raises:
            ScheduleError: step is not a number of steps, or no run has started.
        """
        self._run.running().resume_at(step)
