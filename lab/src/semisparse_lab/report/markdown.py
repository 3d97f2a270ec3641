"""Markdown tables."""

from collections.abc import Iterable, Sequence


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table.

    Args:
        head: Its first two lines, headings and alignments.
        rows: Cells of each row.
    """
    return "\n".join([*head, *(f"| {' | '.join(cells)} |" for cells in rows)])
