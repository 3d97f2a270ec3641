"""One table, three forms: text for a terminal, Markdown for a card, CSV for other programs."""

import csv
import textwrap
from dataclasses import dataclass
from pathlib import Path

WIDTH = 120
"""Columns that a printed table and the source of a card's table may take."""


@dataclass(frozen=True)
class Table:
    """Cells as they are shown, the column of names first.

    Attributes:
        columns: Headings.
        rows: Cells of each row, as many as there are headings.
        notes: Sentences below the table, such as the error of a peer that does not run.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()

    def text(self) -> str:
        """Aligned columns; names to the left, figures to the right; notes wrapped."""
        plain = [tuple(cell.replace("**", "") for cell in row) for row in (self.columns, *self.rows)]
        widths = [max(len(row[place]) for row in plain) for place in range(len(self.columns))]
        lines = []
        for name, *figures in plain:
            cells = [figure.rjust(width) for figure, width in zip(figures, widths[1:], strict=True)]
            lines.append("  ".join([name.ljust(widths[0]), *cells]).rstrip())
        return "\n".join([*lines, *(textwrap.fill(note, WIDTH, subsequent_indent="  ") for note in self.notes)])

    def markdown(self) -> str:
        """A Markdown table with its figures to the right, then the notes as a list."""
        rule = "|".join(["---", *["--:"] * (len(self.columns) - 1)])
        lines = [f"| {' | '.join(row)} |" for row in (self.columns, *self.rows)]
        lines.insert(1, f"|{rule}|")
        return "\n".join([*lines, *(["", *(f"- {note}" for note in self.notes)] if self.notes else [])])

    def write_csv(self, path: Path) -> None:
        """The cells without notes and marks."""
        with path.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(
                [cell.replace("**", "") for cell in row] for row in (self.columns, *self.rows)
            )
