"""What a recipe is: frozen settings that belong together."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from semisparse.config import SparseConfig
from semisparse.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """How to train sparse: config for the layers, and what else happens while they are sparse. Immutable, checked.

        recipe = recipes.fst(decay=6e-5)
        sparsify(model, recipe.config, select="mlp")
        schedule = RecipeSchedule(recipe, model, optimizer, total_steps)
        ... optimizer.step(); schedule.step()          # or schedule.step(scaler), after scaler.update()

    name: for messages and state. config: what the layers must have been swapped with. sparse_fraction: share of the
    steps that are sparse, from the start; the rest is dense. decay: strength of MaskedDecay, 0 for none. refresh_every:
    applied steps for which a mask is held before it is chosen anew; 1 chooses at every forward. dense_range: if given,
    StepAdamW's AutoSwitch decides when a dense phase at the start ends, within these shares of all steps.
    Raises ConfigError when a value is outside its range or two parts exclude each other.
    """

    name: str
    config: SparseConfig = field(default_factory=SparseConfig)
    sparse_fraction: float = 1.0
    decay: float = 0.0
    refresh_every: int = 1
    dense_range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
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
            low, high = self.dense_range
            if not (_is_number(low) and _is_number(high) and 0 <= low <= high <= 1):
                raise ConfigError(f"dense_range={self.dense_range!r} must be two shares, 0 <= first <= second <= 1")
            object.__setattr__(self, "dense_range", (float(low), float(high)))
        self._check_parts()

    def _check_parts(self) -> None:
        if self.config.operand != "weight":
            raise ConfigError(
                f"config.operand={self.config.operand!r}: recipes prune weights; use a SparseSchedule for activations"
            )
        if self.refresh_every > 1 and self.config.mask != "transposable":
            raise ConfigError(
                f"refresh_every={self.refresh_every} holds masks fixed, which config.mask={self.config.mask!r} cannot "
                "be: use mask='transposable' or refresh_every=1"
            )
        if self.decay and self.config.mask == "soft":
            raise ConfigError(f"decay={self.decay}: mask='soft' shrinks continuously and needs no decay; use decay=0")
        if self.dense_range is not None and self.sparse_fraction != 1:
            raise ConfigError(
                f"sparse_fraction={self.sparse_fraction}: with dense_range the switch is found while training; "
                "leave sparse_fraction at 1"
            )

    def describe(self) -> dict[str, Any]:
        """All settings as plain values."""
        return asdict(self)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
