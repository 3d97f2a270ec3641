"""Phases of training, and the saved state of a schedule."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from semisparse.errors import ScheduleError

Kind = Literal["sparse", "dense"]


@dataclass(frozen=True, slots=True)
class Phase:
    """A number of training steps that are all sparse or all dense.

    Args:
        kind: "sparse" or "dense".
        steps: Applied optimizer steps, 0 or more.

    Raises:
        ScheduleError: A value is not one of these.
    """

    kind: Kind
    steps: int

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ScheduleError(f"kind={self.kind!r} is not one of {', '.join(map(repr, get_args(Kind)))}")
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 0:
            raise ScheduleError(f"steps={self.steps!r} must be a whole number of steps, 0 or more")


def kind_at(phases: tuple[Phase, ...], applied: int) -> Kind:
    """The kind of the phase in which the forward after `applied` steps runs; after the last phase its kind stays."""
    end = 0
    for phase in phases:
        end += phase.steps
        if applied < end:
            return phase.kind
    return next(phase.kind for phase in reversed(phases) if phase.steps)


def checked_phases(phases: Any, total_steps: int | None) -> tuple[Phase, ...]:
    """Phases as a schedule keeps them.

    Raises:
        ScheduleError: phases is not a sequence of Phase, holds no step, or does not add up to total_steps.
    """
    if not isinstance(phases, Sequence):
        raise ScheduleError(f"phases={phases!r} must be a list of Phase, such as [Phase('sparse', 100)]")
    for phase in phases:
        if not isinstance(phase, Phase):
            raise ScheduleError(f"phases holds {phase!r}; each must be a Phase, such as Phase('sparse', 100)")
    checked = tuple(phases)
    steps = sum(phase.steps for phase in checked)
    if steps == 0:
        raise ScheduleError(f"phases={checked} hold no step; give at least one phase with steps > 0")
    if total_steps is not None and steps != total_steps:
        raise ScheduleError(f"phases hold {steps} steps, but total_steps={total_steps}; make them add up")
    return checked


def sparse_then_dense(total_steps: int, sparse_fraction: float) -> tuple[Phase, ...]:
    """Sparse for the first round(total_steps * sparse_fraction) steps, dense for the rest."""
    sparse = share_of(total_steps, sparse_fraction, "sparse_fraction")
    return Phase("sparse", sparse), Phase("dense", total_steps - sparse)


def dense_sparse_dense(total_steps: int, dense_start_fraction: float, sparse_fraction: float) -> tuple[Phase, ...]:
    """Dense for dense_start_fraction of total_steps, sparse for sparse_fraction, dense for the rest."""
    start = share_of(total_steps, dense_start_fraction, "dense_start_fraction")
    share_of(total_steps, sparse_fraction, "sparse_fraction")
    if dense_start_fraction + sparse_fraction > 1:
        raise ScheduleError(
            f"dense_start_fraction={dense_start_fraction} and sparse_fraction={sparse_fraction} exceed 1 together"
        )
    end = round(total_steps * (dense_start_fraction + sparse_fraction))
    return Phase("dense", start), Phase("sparse", end - start), Phase("dense", total_steps - end)


def share_of(total_steps: int, fraction: float, name: str) -> int:
    """A share of total_steps, rounded to whole steps.

    Args:
        total_steps: 1 or more.
        fraction: Between 0 and 1.
        name: Of the argument that fraction is, for messages.

    Raises:
        ScheduleError: A value is outside its range.
    """
    if isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps < 1:
        raise ScheduleError(f"total_steps={total_steps!r} must be a whole number of steps, 1 or more")
    if not isinstance(fraction, (int, float)) or not 0 <= fraction <= 1:  # also refuses NaN
        raise ScheduleError(f"{name}={fraction!r} must lie between 0 and 1")
    return round(total_steps * fraction)


def check_count(name: str, value: object) -> None:
    """Raise ScheduleError unless the argument called name is a number of applied steps."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ScheduleError(f"{name}={value!r} must be a whole number, 0 or more")


def checked_state(state: Any, phases: tuple[Phase, ...]) -> tuple[int, float | None, int]:
    """The counter, the last scale and the seed of a state that was saved with these phases.

    Raises:
        ScheduleError: state is of another kind, or was saved with other phases.
    """
    try:
        saved = tuple(Phase(**phase) for phase in state["phases"])
        applied, scale, seed = state["applied_steps"], state["last_scale"], state["seed"]
    except (KeyError, TypeError) as error:
        given = f"with {sorted(map(str, state))}" if isinstance(state, Mapping) else f"of type {type(state).__name__}"
        raise ScheduleError(f"state {given} is not a saved SparseSchedule: {error!r}") from error
    if saved != phases:
        raise ScheduleError(
            f"state has phases {saved}, this schedule {phases}; build it with the same phases to resume"
        )
    check_count("state['applied_steps']", applied)
    if scale is not None and (
        isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 <= scale < math.inf
    ):
        raise ScheduleError(f"state['last_scale']={scale!r} must be a finite number, 0 or more, or None")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ScheduleError(f"state['seed']={seed!r} must be a whole number")
    return applied, scale, seed
