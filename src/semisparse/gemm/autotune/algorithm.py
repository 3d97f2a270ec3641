"""Which algorithm computes a problem and why, and how that is written to JSON and read back."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from semisparse.formats.layout import FP8
from semisparse.gemm.problem import DENSE_MULTIPLE_8BIT

Source = Literal["tuned", "disk", "shared", "shipped", "default"]
Decides = Literal["algorithm", "sampling"]

_IDS = range(2**31)  # the library's ids are int32
_CHUNKS = range(DENSE_MULTIPLE_8BIT, 2**31, DENSE_MULTIPLE_8BIT)
_LONGEST_TEXT = 200


_LIKELY = {
    torch.bfloat16: (17, 20, 12, 0, 15, 14, 1),
    torch.float16: (6, 5, 27, 1, 28, 7, 13),
    FP8: (8, 16, 17, 19, 21, 6, 18),
}
"""Algorithms tried first: the fastest on one H200. The first use of an fp16 kernel takes 0.15 to 0.25 s there, so that
few are reached in time; for bf16 all are, except at the largest problems."""


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
        chunk: Tokens per piece where the sparse product is faster in pieces (gemm/chunks.py); sparse_algorithm and
            sparse_us are then of the pieces. None: whole.
        whole_us: Microseconds of the fastest whole sparse product beside the pieces; None where not measured.
        decides: "algorithm": the above. "sampling": whether a weight gradient (gemm/weight_gradient.py) is computed
            from a sample; algorithm is then 0 if it is, and None if it is a dense fp8 product. sparse_us and dense_us
            are the times of both ways as wholes.
    """

    algorithm: int | None
    sparse_algorithm: int | None
    sparse_us: float | None
    dense_us: float | None
    source: Source
    rejected: tuple[tuple[int, str], ...] = ()
    note: str = ""
    chunk: int | None = None
    whole_us: float | None = None
    decides: Decides = "algorithm"

    def to_record(self) -> dict[str, Any]:
        """As JSON values, without the source, which is known to the reader."""
        # Named only where there are chunks, so that records of whole products are those of earlier versions.
        cut = {} if self.chunk is None else {"chunk": self.chunk, "whole_us": self.whole_us}
        decides = {} if self.decides == "algorithm" else {"decides": self.decides}
        return {
            "algorithm": self.algorithm,
            "sparse_algorithm": self.sparse_algorithm,
            "sparse_us": self.sparse_us,
            "dense_us": self.dense_us,
            "rejected": {str(algorithm): reason for algorithm, reason in self.rejected},
            "note": self.note,
            **cut,
            **decides,
        }

    @property
    def way(self) -> str:
        """How the sparse product runs: "in chunks of 16384 tokens, 1.9x faster than whole"; empty where it is whole."""
        if self.chunk is None:
            return ""
        gain = f", {self.whole_us / self.sparse_us:.2f}x faster than whole" if self.whole_us and self.sparse_us else ""
        return f"in chunks of {self.chunk} tokens{gain}"

    @property
    def origin(self) -> str:
        """The source; for the default of a product that is not tuned why it is not."""
        return (
            self.note if self.source == "default" and self.sparse_algorithm is not None and self.note else self.source
        )

    def __str__(self) -> str:
        if self.decides == "sampling":
            what = "dense fp8 instead of sampled" if self.algorithm is None else "sampled"
        elif self.algorithm is not None:
            what = f"cuSPARSELt algorithm {self.algorithm} {self.way}".rstrip()
        else:
            what = "masked dense" if self.sparse_algorithm is not None else "masked dense (no sparse algorithm works)"
        sparse = "sampled" if self.decides == "sampling" else "sparse"
        times = [f"{us:.1f} us {name}" for name, us in ((sparse, self.sparse_us), ("dense", self.dense_us)) if us]
        return f"{what} ({', '.join([*times, self.origin])})"


def from_record(record: dict[str, Any], source: Source) -> Choice:
    """A choice from JSON values, which may be damaged or foreign.

    Only what could do harm is refused: an id, a chunk or a time that is none. Texts are cut and made printable; unknown
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
    times = _time(record, "sparse_us"), _time(record, "dense_us")
    chunk = record.get("chunk")  # records of earlier versions have none: their products are whole
    if chunk is not None and (type(chunk) is not int or chunk not in _CHUNKS or sparse is None):
        raise ValueError(f"chunk={chunk!r} is not a number of tokens per sparse product that is a multiple of 16")
    whole_us = None if chunk is None else _time(record, "whole_us")
    decides = record.get("decides", "algorithm")
    if decides not in get_args(Decides):
        raise ValueError(f"decides={decides!r} is not one of {', '.join(map(repr, get_args(Decides)))}")
    return Choice(algorithm, sparse, *times, source, rejected, note, chunk, whole_us, decides)


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


def likely_first(algorithms: Iterable[int], dtype: torch.dtype) -> list[int]:
    """Algorithms of an engine in the order in which they are tried.

    Args:
        algorithms: Their ids.
        dtype: Of the operands.
    """
    likely = _LIKELY[dtype]
    return sorted(algorithms, key=lambda number: likely.index(number) if number in likely else len(likely))
