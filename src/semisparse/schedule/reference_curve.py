"""The losses of another run by step, from a mapping or a file."""

import csv
import hashlib
import json
import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from semisparse.errors import ScheduleError

Reference = Mapping[int, float] | str | Path
"""Applied step, counted from 1 -> loss, or the path of a .json or .csv file of them."""


class ReferenceCurve:
    """Losses at some steps, and on straight lines between them.

    Args:
        points: Pairs of step and loss, in any order.

    Attributes:
        first: The first step.
        last: The last step.

    Raises:
        ValueError: A step is not a whole number, 0 or more, or is there twice; a loss is not finite; or there are
            fewer than two pairs.
    """

    def __init__(self, points: Iterable[tuple[Any, Any]]) -> None:
        curve: dict[int, float] = {}
        for step, loss in points:
            if isinstance(step, bool) or not isinstance(step, Integral) or step < 0:
                raise ValueError(f"step {step!r} is not a whole number, 0 or more")
            if step in curve:
                raise ValueError(f"step {step} is there twice")
            if isinstance(loss, bool) or not isinstance(loss, Real) or not math.isfinite(loss):
                raise ValueError(f"the loss of step {step} is {loss!r}, not a finite number")
            curve[int(step)] = float(loss)
        if len(curve) < 2:
            raise ValueError(f"it has {len(curve)} points, and a curve takes two or more")
        self._steps = sorted(curve)
        self._losses = [curve[step] for step in self._steps]
        self.first, self.last = self._steps[0], self._steps[-1]

    def at(self, step: int) -> float | None:
        """The loss at step; None before the first and beyond the last."""
        if not self.first <= step <= self.last:
            return None
        after = min(bisect_right(self._steps, step), len(self._steps) - 1)
        (x0, x1), (y0, y1) = self._steps[after - 1 : after + 1], self._losses[after - 1 : after + 1]
        return y0 + (y1 - y0) * ((step - x0) / (x1 - x0))

    def digest(self) -> str:
        """Of all points, to tell curves apart."""
        return hashlib.sha256(repr((self._steps, self._losses)).encode()).hexdigest()[:16]


def reference_curve(reference: object) -> ReferenceCurve:
    """A curve from a mapping or a file.

    Args:
        reference: A mapping of steps to losses; or a path: .json with an object {"step": loss, ...} or a list
            [[step, loss], ...], or .csv with two columns, step and loss, and perhaps a line of headings.

    Raises:
        ScheduleError: It is neither, the file cannot be read, or its points are no curve.
    """
    if isinstance(reference, Mapping):
        try:
            return ReferenceCurve(reference.items())
        except (OverflowError, ValueError) as error:
            raise ScheduleError(f"reference: {error}; pass a mapping of steps to losses") from error
    if not isinstance(reference, (str, Path)):
        raise ScheduleError(f"reference is a {type(reference).__name__}: pass a mapping of steps to losses, or a path")
    path = Path(reference)
    readers = {".json": _from_json, ".csv": _from_csv}
    if path.suffix not in readers:
        raise ScheduleError(f"reference={str(path)!r} must end in .json or .csv")
    try:
        return ReferenceCurve(readers[path.suffix](path.read_text(encoding="utf-8-sig")))
    except OSError as error:
        raise ScheduleError(f"reference={str(path)!r} cannot be read: {error.strerror or error}") from error
    except (csv.Error, OverflowError, RecursionError, TypeError, ValueError) as error:
        raise ScheduleError(
            f"reference={str(path)!r} holds no curve that can be used ({error}): it takes pairs of step and loss"
        ) from error


def _from_json(text: str) -> list[tuple[Any, Any]]:
    content = json.loads(text, object_pairs_hook=lambda pairs: [(_step(step), loss) for step, loss in pairs])
    if not isinstance(content, list):
        raise ValueError(f"it holds a {type(content).__name__}, not an object or a list")
    return [(step, loss) for step, loss in content]


def _from_csv(text: str) -> list[tuple[Any, Any]]:
    rows = [row for row in csv.reader(text.splitlines()) if row]
    for row in rows:
        if len(row) != 2:
            raise ValueError(f"a line has {len(row)} columns: {','.join(row)[:40]!r}")
    headed = rows and not any(map(_is_number, rows[0]))
    return [(_step(step), float(loss)) for step, loss in rows[1 if headed else 0 :]]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _step(text: str) -> int | str:
    """The number that text spells, else the text."""
    return int(text) if text.strip().isdecimal() else text
