"""Which algorithm computes a problem and why, and how that is written to JSON and read back."""

import math
from dataclasses import dataclass
from typing import Any, Literal

Source = Literal["tuned", "disk", "shared", "shipped", "default"]

_IDS = range(2**31)  # the library's ids are int32
_LONGEST_TEXT = 200


@dataclass(frozen=True, slots=True)
class Choice:
    """How to compute one problem.

    Attributes:
        algorithm: What backend "auto" runs; None is the masked-dense product.
        sparse_algorithm: The fastest right algorithm, for backend "cusparselt"; None where there is none.
        sparse_us: Microseconds of it on the device; None where not measured.
        dense_us: Microseconds of the masked-dense product, unpacking included; None where not measured.
        source: "tuned" in this process, read from "disk", "shared" by another rank, "shipped" with the package, or
            "default": algorithm 0, unchecked, or masked dense where there is no engine.
        rejected: (algorithm, reason) of each one that was wrong, failed, or was not reached in time.
        note: What disturbed the measurement (memory ran out, the library refused the whole problem). Such a choice
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
        """As JSON values, without the source, which is known to the reader."""
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


def from_record(record: dict[str, Any], source: Source) -> Choice:
    """A choice from JSON values, which may be damaged or foreign.

    Only what could do harm is refused: an id or a time that is not a number. Texts are cut and made printable; unknown
    fields are ignored.

    Args:
        record: As Choice.to_record gives it.
        source: Where the record comes from.

    Returns:
        A choice. Whether the library offers its algorithm is checked at the first call with its problem.

    Raises:
        AttributeError, KeyError, OverflowError, TypeError, ValueError: The record is damaged.
    """
    algorithm, sparse = record["algorithm"], record["sparse_algorithm"]
    if sparse is not None and (type(sparse) is not int or sparse not in _IDS):
        raise ValueError(f"sparse_algorithm={sparse!r} is not the id of an algorithm")
    if algorithm is not None and (type(algorithm) is not int or algorithm != sparse):
        raise ValueError(f"algorithm={algorithm!r} is neither null nor sparse_algorithm={sparse}")
    rejected = tuple(sorted((int(name), clipped(str(why))) for name, why in record.get("rejected", {}).items()))
    note = clipped(str(record.get("note", "")))
    return Choice(algorithm, sparse, _time(record, "sparse_us"), _time(record, "dense_us"), source, rejected, note)


def _time(record: dict[str, Any], name: str) -> float | None:
    value = record.get(name)
    if value is None:
        return None
    if type(value) not in (int, float) or not 0 < float(value) < math.inf:  # float() refuses integers beyond a float
        raise ValueError(f"{name}={value!r} is not a time in microseconds")
    return float(value)


def one_line(error: BaseException) -> str:
    """An exception as a short printable line, fit for `rejected` and `note`."""
    return clipped(f"{type(error).__name__}: {error}".partition("\n")[0])


def clipped(text: str) -> str:
    """text cut to the length that a choice keeps, with a question mark for each character that is not printable."""
    return "".join(letter if letter.isprintable() else "?" for letter in text[:_LONGEST_TEXT])
