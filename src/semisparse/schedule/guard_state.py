"""What a loss guard has seen so far, and its saved form."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from semisparse.errors import ScheduleError
from semisparse.schedule.averages import Average


@dataclass(slots=True)
class GuardState:
    """What was seen of a run's losses; plain numbers.

    Attributes:
        since: Applied steps at which the sparse phase began that is watched; None before one.
        last_step: The applied step of the last loss that was taken.
        loss: Average of the losses of this sparse phase, a value per interval.
        gap: Average of the losses less the reference at their steps, likewise.
        best: The lowest smoothed loss at a comparison, where the run is its own reference.
        above: Comparisons in a row in which the loss was above the limit.
        comparisons: Comparisons in this sparse phase.
        not_finite: Losses that were left out, in the whole run.
        compared: Applied step, smoothed loss, reference and limit of the last comparison.
        tripped_at: Applied steps at which the guard tripped.
    """

    since: int | None = None
    last_step: int | None = None
    loss: Average = field(default_factory=Average)
    gap: Average = field(default_factory=Average)
    best: float | None = None
    above: int = 0
    comparisons: int = 0
    not_finite: int = 0
    compared: tuple[int, float, float, float] | None = None
    tripped_at: int | None = None

    def restart(self, since: int | None) -> None:
        """Begin anew with the sparse phase that began after `since` applied steps."""
        self.since, self.loss, self.gap, self.best, self.above, self.comparisons = (
            since,
            Average(),
            Average(),
            None,
            0,
            0,
        )

    def to_record(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class GuardReport:
    """The last comparison of a LossGuard; print() shows it.

    Attributes:
        step: Applied step after which it was made; None, as the next three, if there was none so far.
        loss: The smoothed training loss.
        reference: What it was compared with, smoothed in the same way.
        limit: The highest loss that is allowed.
        above: Comparisons in a row in which the loss was above the limit.
        not_finite: Losses left out so far because they were NaN or infinite.
        tripped_at: Applied steps after which the guard ended the sparse phase; None if it has not.
    """

    step: int | None
    loss: float | None
    reference: float | None
    limit: float | None
    above: int
    not_finite: int
    tripped_at: int | None

    def __str__(self) -> str:
        if self.step is None:
            text = "no loss was compared so far"
        else:
            text = (
                f"step {self.step}: smoothed loss {self.loss:.6g}, reference {self.reference:.6g}, limit "
                f"{self.limit:.6g}; above the limit in {self.above} comparisons in a row"
            )
        text += f"; {self.not_finite} losses were not finite" if self.not_finite else ""
        return text + (f"; sparse phase ended at step {self.tripped_at}" if self.tripped_at is not None else "")


def from_record(record: Any) -> GuardState:
    """The state that to_record gave.

    Args:
        record: A mapping with all its fields.

    Raises:
        ScheduleError: It is another kind of value, or damaged.
    """
    try:
        values = _exactly(record, GuardState)
        counts = [values[name] for name in ("above", "comparisons", "not_finite")]
        optional = [values[name] for name in ("since", "last_step", "tripped_at")]
        counts += [value for value in optional if value is not None]
        for name in ("loss", "gap"):
            numbers = _exactly(values[name], Average)
            count = numbers.pop("count")
            counts.append(count)
            values[name] = Average(**{key: _number(value) for key, value in numbers.items()}, count=count)
        values["best"] = None if values["best"] is None else _number(values["best"])
        if values["compared"] is not None:
            step, *rest = values["compared"]
            smoothed, reference, limit = map(_number, rest)
            counts.append(step)
            values["compared"] = (step, smoothed, reference, limit)
        for count in counts:
            if isinstance(count, bool) or not isinstance(count, int) or count < 0:
                raise ValueError(f"{count!r} is not a whole number, 0 or more")
    except (TypeError, ValueError) as error:
        raise ScheduleError(f"state['progress'] is not that of a LossGuard: {error}") from error
    return GuardState(**values)


def _exactly(record: Any, kind: type) -> dict[str, Any]:
    names = {each.name for each in fields(kind)}
    if not isinstance(record, Mapping) or record.keys() != names:
        raise ValueError(f"it must be a mapping with {', '.join(sorted(names))}")
    return dict(record)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isinf(value):
        raise ValueError(f"{value!r} is not a number")
    return float(value)
