"""When to be sparse: phases counted in applied optimizer steps."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self, get_args

import torch
from torch import nn

from semisparse.errors import NoLayerMatched, ScheduleError
from semisparse.nn import SemiSparseBase
from semisparse.swap import semi_sparse_layers

Kind = Literal["sparse", "dense"]


@dataclass(frozen=True, slots=True)
class Phase:
    """A stretch of training. kind: "sparse" or "dense"; steps: applied optimizer steps, 0 or more."""

    kind: Kind
    steps: int

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ScheduleError(f"kind={self.kind!r} is not one of {', '.join(map(repr, get_args(Kind)))}")
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 0:
            raise ScheduleError(f"steps={self.steps!r} must be a whole number of steps, 0 or more")


class SparseSchedule:
    """Switches the semi-sparse layers of a model between sparse and dense as optimizer steps are applied.

    Call step() once after each optimizer.step(), or step(scaler) after scaler.update(). Switching sets a flag on the
    layers: no second swap, no change of parameters. In a dense phase the mask is simply not applied. After the last
    phase its kind stays. Under torch.compile a switch costs one recompilation.

    model: a model that already holds semi-sparse layers. phases: in order. total_steps: if given, the phases must add
    up to it. Raises NoLayerMatched when model has no semi-sparse layer, ScheduleError when the phases do not fit.
    """

    def __init__(self, model: nn.Module, phases: Sequence[Phase], *, total_steps: int | None = None) -> None:
        self._phases = tuple(phases)
        for phase in self._phases:
            if not isinstance(phase, Phase):
                raise ScheduleError(f"phases holds {phase!r}; each must be a Phase, such as Phase('sparse', 100)")
        steps = sum(phase.steps for phase in self._phases)
        if steps == 0:
            raise ScheduleError(f"phases={self._phases} hold no step; give at least one phase with steps > 0")
        if total_steps is not None and steps != total_steps:
            raise ScheduleError(f"phases hold {steps} steps, but total_steps={total_steps}; make them add up")
        self._layers: tuple[SemiSparseBase, ...] = tuple(semi_sparse_layers(model).values())
        if not self._layers:
            raise NoLayerMatched(
                f"model={type(model).__name__} has no semi-sparse layer to schedule; call sparsify first"
            )
        self._applied_steps = 0
        self._last_scale: float | None = None
        self._apply()

    @classmethod
    def sparse_then_dense(cls, model: nn.Module, total_steps: int, sparse_fraction: float = 0.7) -> Self:
        """Sparse for the first round(total_steps * sparse_fraction) steps, dense for the rest."""
        sparse = share_of(total_steps, sparse_fraction, "sparse_fraction")
        return cls(model, [Phase("sparse", sparse), Phase("dense", total_steps - sparse)])

    @classmethod
    def dense_sparse_dense(
        cls, model: nn.Module, total_steps: int, dense_start_fraction: float, sparse_fraction: float
    ) -> Self:
        """Dense for dense_start_fraction of total_steps, sparse for sparse_fraction, dense for the rest.

        Each boundary is rounded to a whole step.
        """
        start = share_of(total_steps, dense_start_fraction, "dense_start_fraction")
        share_of(total_steps, sparse_fraction, "sparse_fraction")
        if dense_start_fraction + sparse_fraction > 1:
            raise ScheduleError(
                f"dense_start_fraction={dense_start_fraction} and sparse_fraction={sparse_fraction} exceed 1 together"
            )
        end = round(total_steps * (dense_start_fraction + sparse_fraction))
        phases = [Phase("dense", start), Phase("sparse", end - start), Phase("dense", total_steps - end)]
        return cls(model, phases)

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The phases in order."""
        return self._phases

    @property
    def applied_steps(self) -> int:
        """Optimizer steps counted so far; skipped ones are not among them."""
        return self._applied_steps

    @property
    def phase(self) -> Kind:
        """The kind of the phase that the next forward runs in."""
        end = 0
        for phase in self._phases:
            end += phase.steps
            if self._applied_steps < end:
                return phase.kind
        return next(phase.kind for phase in reversed(self._phases) if phase.steps)

    def step(self, scaler: torch.amp.GradScaler | None = None) -> bool:
        """Count one optimizer step and switch the layers when a phase ends. Returns whether the step counted.

        scaler: the GradScaler, after its update(), of this optimizer alone: one shared with others also goes down for
        their overflows, and the step of this one would not count. A scale that went down since the last call means that
        the optimizer step was skipped; it is then not counted. (Optimizer step hooks cannot be used for this: those of
        a fused optimizer fire for skipped steps too.) Reading the scale synchronises with the device. Raises
        ScheduleError for a scaler that is none.
        """
        if scaler is not None and not isinstance(scaler, torch.amp.GradScaler):
            raise ScheduleError(
                f"step({scaler!r}): the argument is a torch.amp.GradScaler; leave it out where there is none"
            )
        if scaler is not None and self._was_skipped(scaler):
            return False
        self._advance()
        return True

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and strings: the counter, the phases and the last scale seen."""
        return {
            "applied_steps": self._applied_steps,
            "phases": [asdict(phase) for phase in self._phases],
            "last_scale": self._last_scale,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where state was saved, also in mid-phase. Raises ScheduleError, changing nothing, on a misfit."""
        self._applied_steps, self._last_scale = checked_state(state, self._phases)
        self._apply()

    def __repr__(self) -> str:
        plan = " -> ".join(f"{phase.steps} {phase.kind}" for phase in self._phases)
        return f"{type(self).__name__}({plan}; {self._applied_steps} applied, now {self.phase})"

    def _advance(self) -> None:
        self._applied_steps += 1
        self._apply()

    def _apply(self) -> None:
        sparse = self.phase == "sparse"
        for layer in self._layers:
            layer.sparse_enabled = sparse

    def _was_skipped(self, scaler: torch.amp.GradScaler) -> bool:
        state = scaler.state_dict()
        if not state:  # a disabled scaler never skips
            return False
        scale = state["scale"]
        if self._last_scale is None:
            # First sight: an applied step left a count behind, unless it made the scale grow.
            skipped = state["_growth_tracker"] == 0 and scale < scaler._init_scale
        else:
            skipped = scale < self._last_scale
        self._last_scale = scale
        return bool(skipped)


def share_of(total_steps: int, fraction: float, name: str) -> int:
    """A share of total_steps in whole steps; name: of fraction, for messages. Raises ScheduleError."""
    if isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps < 1:
        raise ScheduleError(f"total_steps={total_steps!r} must be a whole number of steps, 1 or more")
    if not isinstance(fraction, (int, float)) or not 0 <= fraction <= 1:  # also refuses NaN
        raise ScheduleError(f"{name}={fraction!r} must lie between 0 and 1")
    return round(total_steps * fraction)


def checked_state(state: Any, phases: tuple[Phase, ...]) -> tuple[int, float | None]:
    """The counter and the last scale of a state that was saved with these phases. Raises ScheduleError."""
    try:
        saved = tuple(Phase(**phase) for phase in state["phases"])
        applied, scale = state["applied_steps"], state["last_scale"]
    except (KeyError, TypeError) as error:
        given = f"with {sorted(map(str, state))}" if isinstance(state, Mapping) else f"of type {type(state).__name__}"
        raise ScheduleError(f"state {given} is no saved SparseSchedule: {error!r}") from error
    if saved != phases:
        raise ScheduleError(
            f"state has phases {saved}, this schedule {phases}; build it with the same phases to resume"
        )
    if isinstance(applied, bool) or not isinstance(applied, int) or applied < 0:
        raise ScheduleError(f"state['applied_steps']={applied!r} must be a whole number, 0 or more")
    if scale is not None and (isinstance(scale, bool) or not isinstance(scale, (int, float))):
        raise ScheduleError(f"state['last_scale']={scale!r} must be a number or None")
    return applied, scale
