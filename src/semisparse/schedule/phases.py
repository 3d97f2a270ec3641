"""Stretches of training, and the state of where a schedule stands in them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from semisparse.errors import ScheduleError

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


def kind_at(phases: tuple[Phase, ...], applied: int) -> Kind:
    """The kind of the phase that the forward after so many applied steps runs in. After the last one its kind stays."""
    end = 0
    for phase in phases:
        end += phase.steps
        if applied < end:
            return phase.kind
    return next(phase.kind for phase in reversed(phases) if phase.steps)


def share_of(total_steps: int, fraction: float, name: str) -> int:
    """A share of total_steps in whole steps; name: of fraction, for messages. Raises ScheduleError."""
    if isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps < 1:
        raise ScheduleError(f"total_steps={total_steps!r} must be a whole number of steps, 1 or more")
    if not isinstance(fraction, (int, float)) or not 0 <= fraction <= 1:  # also refuses NaN
        raise ScheduleError(f"{name}={fraction!r} must lie between 0 and 1")
    return round(total_steps * fraction)


def check_count(name: str, value: object) -> None:
    """Raise ScheduleError unless value is a number of applied steps; name: of the argument."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ScheduleError(f"{name}={value!r} must be a whole number, 0 or more")


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
    check_count("state['applied_steps']", applied)
    if scale is not None and (
        isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 <= scale < math.inf
    ):
        raise ScheduleError(f"state['last_scale']={scale!r} must be a finite number, 0 or more, or None")
    return applied, scale
