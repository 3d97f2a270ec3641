"""What a swap did: one row a layer, with the reason for every layer left alone."""

from collections.abc import Iterator
from dataclasses import dataclass

SWAPPED = "swapped"
SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class LayerRow:
    """One layer of a report. reason is empty for a swapped layer without remarks."""

    name: str
    out_features: int
    in_features: int
    status: str
    reason: str = ""


@dataclass(frozen=True, slots=True)
class SwapReport:
    """The rows of one swap, in the model's order, and remarks on the selection. print() shows a table."""

    rows: tuple[LayerRow, ...]
    remarks: tuple[str, ...] = ()

    @property
    def swapped(self) -> tuple[str, ...]:
        """Names of the layers that were changed."""
        return tuple(row.name for row in self.rows if row.status == SWAPPED)

    @property
    def skipped(self) -> dict[str, str]:
        """Name -> reason of the layers that were looked at and left alone."""
        return {row.name: row.reason for row in self.rows if row.status == SKIPPED}

    def __iter__(self) -> Iterator[LayerRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        header = ("layer", "N x K", "result", "why")
        body = [
            (row.name or "(root)", f"{row.out_features} x {row.in_features}", row.status, row.reason)
            for row in self.rows
        ]
        widths = [max(len(line[column]) for line in [header, *body]) for column in range(3)]
        lines = ["  ".join([*(cell.ljust(w) for cell, w in zip(line, widths, strict=False)), line[3]]).rstrip()
                 for line in [header, *body]]  # fmt: skip
        lines.append(f"{len(self.swapped)} of {len(self.rows)} linear layers {SWAPPED}")
        return "\n".join([*lines, *self.remarks])
