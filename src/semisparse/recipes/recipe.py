"""What a recipe is: frozen settings that belong together."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from semisparse import masks
from semisparse.config import SparseConfig
from semisparse.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """How to train sparse: config for the layers, and what else happens while they are sparse. Immutable and checked.

        recipe = recipes.fst(decay=6e-5)
        sparsify(model, recipe.config, select="mlp")
        schedule = RecipeSchedule(recipe, model, optimizer, total_steps)
        ... optimizer.step(); schedule.step()          # or schedule.step(scaler), after scaler.update()

    Args:
        name: For messages and state.
        config: What the layers must have been swapped with.
        sparse_fraction: Share of the steps that are sparse, from the start; the rest is dense.
        decay: Strength of MaskedDecay; 0 for none.
        refresh_every: Applied steps for which a mask is held; 1 chooses masks at every forward.
        dense_range: If given, AutoSwitch decides when a dense phase at the start ends, within these shares of all
            steps. Needs StepAdamW.

    Raises:
        ConfigError: A value is outside its range, or two parts exclude each other.
    """

    name: str
    config: SparseConfig = field(default_factory=SparseConfig)
    sparse_fraction: float = 1.0
    decay: float = 0.0
    refresh_every: int = 1
    dense_range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ConfigError(f"name={self.name!r} must be a non-empty string")
        if not isinstance(self.config, SparseConfig):
            raise ConfigError(f"config={self.config!r} must be a SparseConfig")
        if not _is_number(self.sparse_fraction) or not 0 <= self.sparse_fraction <= 1:
            raise ConfigError(f"sparse_fraction={self.sparse_fraction!r} must lie between 0 and 1")
        if not _is_number(self.decay) or not 0 <= self.decay < math.inf:
            raise ConfigError(f"decay={self.decay!r} must be a number, 0 or more")
        every = self.refresh_every
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ConfigError(f"refresh_every={every!r} must be a whole number of applied steps, 1 or more")
        if self.dense_range is not None:
            object.__setattr__(self, "dense_range", _range(self.dense_range))
        self._check_parts()

    def _check_parts(self) -> None:
        if self.config.weight is None:
            raise ConfigError("config.weight=None: recipes prune weights; use a SparseSchedule for other layers")
        name = f"config.weight={self.config.weight!r}"
        if self.refresh_every > 1 and not masks.get(self.config.weight).from_codes:
            raise ConfigError(
                f"refresh_every={self.refresh_every} holds masks fixed, which {name} cannot be: use "
                "weight='transposable' or refresh_every=1"
            )
        if self.decay and self.needs_scale:
            raise ConfigError(f"decay={self.decay}: {name} shrinks continuously and needs no decay; use decay=0")
        if self.dense_range is not None and self.needs_scale:
            raise ConfigError(
                f"dense_range={self.dense_range}: {name} takes its scale at the start, and weights would move away "
                "from it in a dense phase; use weight='row' or no dense_range"
            )
        if self.dense_range is not None and self.sparse_fraction != 1:
            raise ConfigError(
                f"sparse_fraction={self.sparse_fraction}: with dense_range the switch is found while training; "
                "leave sparse_fraction at 1"
            )

    @property
    def needs_scale(self) -> bool:
        """Whether the mask multiplies by a scale that is taken when the recipe starts."""
        return self.config.weight is not None and masks.get(self.config.weight).needs_scale

    @property
    def counts_only(self) -> bool:
        """Whether a running recipe has no state but its counter, so that resume_at is enough to continue it."""
        return not self.needs_scale and self.refresh_every == 1 and self.dense_range is None

    def __str__(self) -> str:
        """The settings, which products of a layer are sparse, and when."""
        said = [f"{self.name}: {self.config}"]
        if self.dense_range is not None:
            low, high = self.dense_range
            said.append(f"dense first, sparse from a step between {low:.0%} and {high:.0%} of all")
        elif self.sparse_fraction == 1:
            said.append("sparse in all steps")
        else:
            said.append(f"sparse for the first {self.sparse_fraction:.0%} of the steps, then dense")
        if self.decay:
            said.append(f"pruned weights decay by {self.decay:g}")
        if self.refresh_every > 1:
            said.append(f"masks held for {self.refresh_every} applied steps")
        return "; ".join(said)

    def describe(self) -> dict[str, Any]:
        """All settings as plain values."""
        return asdict(self)


def _range(value: object) -> tuple[float, float]:
    if isinstance(value, (tuple, list)) and len(value) == 2 and all(map(_is_number, value)):
        low, high = value
        if 0 <= low <= high <= 1 and high > 0:
            return float(low), float(high)
    raise ConfigError(f"dense_range={value!r} must be two shares of the steps, 0 <= first <= second <= 1, second not 0")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
