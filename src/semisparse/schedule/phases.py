"""Phases of training, and the saved state of a schedule."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

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


def sparse_since(phases: tuple[Phase, ...], applied: int) -> int | None:
    """Applied steps at which the sparse phase began in which the forward after `applied` steps runs; None if dense."""
    if kind_at(phases, applied) == "dense":
        return None
    return max(begin for begin, _ in sparse_stretches(phases) if begin <= applied)


def sparse_stretches(phases: tuple[Phase, ...]) -> list[tuple[int, int]]:
    """Applied steps at which each sparse phase begins and ends; those that follow one another are one."""
    found: list[tuple[int, int]] = []
    end = 0
    for phase in phases:
        if phase.kind == "sparse" and phase.steps:
            begin = found.pop()[0] if found and found[-1][1] == end else end
            found.append((begin, end + phase.steps))
        end += phase.steps
    return found


def ended_early(phases: tuple[Phase, ...], at: int) -> tuple[Phase, ...]:
    """The phases up to `at` applied steps, and dense from there to the end of all phases, or for ever beyond it."""
    kept, end = [], 0
    for phase in phases:
        if steps := min(phase.steps, at - end):
            kept.append(Phase(phase.kind, steps))
        end += steps
    if end < at:  # beyond the last phase, whose kind stays
        kept.append(Phase("sparse", at - end))
    return *kept, Phase("dense", max(sum(phase.steps for phase in phases) - at, 1))


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


class Saved(NamedTuple):
    """What a state of a schedule holds.

    Attributes:
        applied_steps: The counter.
        last_scale: The last scale of a GradScaler that was seen, or None.
        seed: Of the random numbers.
        ended_at: Applied steps at which the sparse phase was ended early, or None.
        phases: As they were when the state was saved.
    """

    applied_steps: int
    last_scale: float | None
    seed: int
    ended_at: int | None
    phases: tuple[Phase, ...]


def checked_state(state: Any, phases: tuple[Phase, ...]) -> Saved:
    """The contents of a state that was saved with these phases, perhaps ended early since.

    Args:
        state: What state_dict() returned; without "ended_at" (of earlier versions) nothing was ended early.
        phases: As planned.

    Raises:
        ScheduleError: state is of another kind, or was saved with other phases.
    """
    try:
        saved = tuple(Phase(**phase) for phase in state["phases"])
        applied, scale, seed = state["applied_steps"], state["last_scale"], state["seed"]
        ended_at = state.get("ended_at")
    except (AttributeError, KeyError, TypeError) as error:
        given = f"with {sorted(map(str, state))}" if isinstance(state, Mapping) else f"of type {type(state).__name__}"
        raise ScheduleError(f"state {given} is not a saved SparseSchedule: {error!r}") from error
    if ended_at is not None:
        check_count("state['ended_at']", ended_at)
        if kind_at(phases, ended_at) != "sparse":
            raise ScheduleError(f"state['ended_at']={ended_at} is not in a sparse phase of {phases}")
        phases = ended_early(phases, ended_at)
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
    return Saved(applied, scale, seed, ended_at, phases)
