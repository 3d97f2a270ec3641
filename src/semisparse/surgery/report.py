"""What a swap did: one row per layer, with the reason for every layer that stays dense."""

from collections.abc import Iterator
from dataclasses import dataclass, fields

from semisparse.config import SparseConfig

SWAPPED = "swapped"
SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class LayerRow:
    """One layer of a report.

    Attributes:
        name: The layer's name; "" for the root.
        out_features: N.
        in_features: K.
        status: "swapped" or "skipped".
        reason: Why it was skipped, or what to know about a swapped layer; often empty.
        config: Settings of a layer that was made semi-sparse, otherwise None.
    """

    name: str
    out_features: int
    in_features: int
    status: str
    reason: str = ""
    config: SparseConfig | None = None


@dataclass(frozen=True, slots=True)
class SwapReport:
    """The rows of one swap; print() shows a table.

    Attributes:
        rows: One per layer, in the model's order.
        remarks: On selectors without effect, and on parameters outside nn.Linear.
    """

    rows: tuple[LayerRow, ...]
    remarks: tuple[str, ...] = ()

    @property
    def swapped(self) -> tuple[str, ...]:
        """Names of the layers that were changed."""
        return tuple(row.name for row in self.rows if row.status == SWAPPED)

    @property
    def skipped(self) -> dict[str, str]:
        """Name -> reason of the layers that were examined and not changed."""
        return {row.name: row.reason for row in self.rows if row.status == SKIPPED}

    @property
    def configs(self) -> dict[str, SparseConfig]:
        """Name -> settings of the layers that were made semi-sparse: the mapping that sparsify takes."""
        return {row.name: row.config for row in self.rows if row.config is not None}

    def __iter__(self) -> Iterator[LayerRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        table = [["layer", "N x K", "result", "config", "why"]]
        for row in self.rows:
            size = f"{row.out_features} x {row.in_features}"
            table.append([row.name or "(root)", size, row.status, _shown(row.config), row.reason])
        if not self.configs:  # of densify
            table = [[*line[:3], line[4]] for line in table]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table
        ]
        lines.append(f"{len(self.swapped)} of {len(self.rows)} linear layers {SWAPPED}")
        return "\n".join([*lines, *self.remarks])


def _shown(config: SparseConfig | None) -> str:
    """The settings that say something: neither None nor False nor "auto"."""
    if config is None:
        return ""
    values = [(field.name, getattr(config, field.name)) for field in fields(config)]
    return " ".join(f"{name}={value}" for name, value in values if value not in (None, False, "auto"))
