"""What was chosen for a problem and why; how that is written to JSON, and checked when it is read back."""

import sys
from dataclasses import dataclass
from typing import Any, Literal

Source = Literal["tuned", "disk", "shared", "shipped", "default"]

ALGORITHM_LIMIT = 1024
"""Algorithm ids in a file must lie below this; the engine then checks them against what the library offers."""

_LONGEST_TEXT = 200
_NAMES = frozenset(map(str, range(ALGORITHM_LIMIT)))
_FIELDS = {"algorithm", "sparse_algorithm", "sparse_us", "dense_us", "rejected", "note"}


@dataclass(frozen=True, slots=True)
class Choice:
    """How to compute one problem.

    algorithm: what engine="auto" runs; None means the masked-dense product.
    sparse_algorithm: the fastest algorithm that is right, for engine="cusparselt"; None when there is none.
    sparse_us, dense_us: measured microseconds on the device; dense includes unpacking. None where not measured.
    source: "tuned" here and now, "disk", "shared" by another rank, "shipped" with the package, or "default", which is
        algorithm 0, unchecked, or masked dense where there is no engine.
    rejected: (algorithm, reason) for each one that was wrong, failed, or was not reached in time.
    note: what disturbed the measurement (memory ran out, the library refused the problem as a whole). Such a choice
        serves this process only and is not written to disk.
    """

    algorithm: int | None
    sparse_algorithm: int | None
    sparse_us: float | None
    dense_us: float | None
    source: Source
    rejected: tuple[tuple[int, str], ...] = ()
    note: str = ""

    def to_record(self) -> dict[str, Any]:
        """As JSON values; the source is left out, since it is the reader's affair."""
        return {
            "algorithm": self.algorithm,
            "sparse_algorithm": self.sparse_algorithm,
            "sparse_us": self.sparse_us,
            "dense_us": self.dense_us,
            "rejected": {str(algorithm): reason for algorithm, reason in self.rejected},
            "note": self.note,
        }

    def __str__(self) -> str:
        if self.algorithm is not None:
            what = f"cuSPARSELt algorithm {self.algorithm}"
        else:
            what = "masked dense" if self.sparse_algorithm is not None else "masked dense (no sparse algorithm works)"
        times = [f"{us:.1f} us {name}" for name, us in (("sparse", self.sparse_us), ("dense", self.dense_us)) if us]
        return f"{what} ({', '.join([*times, self.source])})"


def from_record(record: object, source: Source) -> Choice:
    """A choice from JSON values. Raises ValueError, saying which field is wrong, unless every field is as written."""
    if not isinstance(record, dict) or set(record) != _FIELDS:
        raise ValueError(f"a choice must have exactly the fields {', '.join(sorted(_FIELDS))}")
    algorithm = _identifier(record["algorithm"], "algorithm")
    sparse = _identifier(record["sparse_algorithm"], "sparse_algorithm")
    if algorithm is not None and algorithm != sparse:
        raise ValueError(f"algorithm={algorithm} must be null or equal sparse_algorithm={sparse}")
    sparse_us, dense_us = _time(record["sparse_us"], "sparse_us"), _time(record["dense_us"], "dense_us")
    rejected, note = _rejected(record["rejected"]), _text(record["note"], "note")
    return Choice(algorithm, sparse, sparse_us, dense_us, source, rejected, note)


def _identifier(value: object, name: str) -> int | None:
    if value is not None and (type(value) is not int or not 0 <= value < ALGORITHM_LIMIT):
        raise ValueError(f"{name}={value!r} is no algorithm id")
    return value


def _time(value: object, name: str) -> float | None:
    if value is None:
        return None
    # A limit that is a float, not merely finite: JSON has integers beyond any float, and 10**400 < math.inf.
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= sys.float_info.max:
        raise ValueError(f"{name}={value!r} is no time")
    return float(value)


def _text(value: object, name: str) -> str:
    if not isinstance(value, str) or len(value) > _LONGEST_TEXT or not (value.isprintable()):
        raise ValueError(f"{name} is no line of at most {_LONGEST_TEXT} characters")
    return value


def _rejected(value: object) -> tuple[tuple[int, str], ...]:
    if not isinstance(value, dict) or len(value) > ALGORITHM_LIMIT:
        raise ValueError("rejected is no table of algorithms")
    found = []
    for name, reason in value.items():
        if name not in _NAMES:
            raise ValueError(f"rejected has the algorithm {name!r}")
        found.append((int(name), _text(reason, "a reason")))
    return tuple(sorted(found))


def one_line(error: BaseException) -> str:
    """An exception as a short printable line, fit for `rejected` and `note`."""
    return clipped(f"{type(error).__name__}: {error}".partition("\n")[0])


def clipped(text: str) -> str:
    """text cut to the length that a file may hold, with a question mark for what cannot be printed."""
    return "".join(letter if letter.isprintable() else "?" for letter in text[:_LONGEST_TEXT])
