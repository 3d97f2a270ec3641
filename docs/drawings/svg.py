"""What the drawings are made of: rectangles, words and lines on a transparent page, as SVG."""

from xml.sax.saxutils import escape, quoteattr

from semisparse_lab.report.style import INK

WIDTH = 850
"""Pixels of a drawing: the width of a README."""

SIZE = 13
"""Pixels of the words."""

MARGIN = 4
"""Pixels at both sides, for edges that lie on 0 or WIDTH."""

FONT = "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif"


class Drawing:
    """A drawing that grows part by part.

    Args:
        title: What it shows, for screen readers.
        height: Pixels.
    """

    def __init__(self, title: str, height: float) -> None:
        self._title, self._height, self._parts = title, height, list[str]()

    def rectangle(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        fill: str = "none",
        opacity: float = 1,
        stroke: str = "none",
    ) -> None:
        """A rectangle by its upper left corner, filled, or with an edge, or both."""
        self._parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}" fill-opacity="{opacity:g}" '
            f'stroke="{stroke}"/>'
        )

    def words(
        self,
        x: float,
        y: float,
        text: str,
        anchor: str = "start",
        fill: str = INK,
        size: float = SIZE,
        bold: bool = False,
    ) -> None:
        """Words whose baseline is at y; anchor says which end of them is at x: start, middle or end."""
        weight = ' font-weight="bold"' if bold else ""
        self._parts.append(
            f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" fill="{fill}" font-size="{size:g}"{weight}>'
            f"{escape(text)}</text>"
        )

    def line(self, x: float, y: float, to_x: float, to_y: float, opacity: float = 1) -> None:
        """A thin line in the colour of words."""
        self._parts.append(
            f'<line x1="{x:g}" y1="{y:g}" x2="{to_x:g}" y2="{to_y:g}" stroke="{INK}" stroke-opacity="{opacity:g}"/>'
        )

    def __str__(self) -> str:
        box = f"{-MARGIN} 0 {WIDTH + 2 * MARGIN} {self._height:g}"
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{self._height:g}" viewBox="{box}" '
            f'role="img" aria-label={quoteattr(self._title)} font-family="{FONT}">'
        )
        return "\n".join([head, f"<title>{escape(self._title)}</title>", *self._parts, "</svg>", ""])


def on(fill: str) -> str:
    """Black or white, whichever is read more easily on a colour, by the luminance of WCAG 2.1 with one power."""
    shares = [(int(fill[place : place + 2], 16) / 255) ** 2.2 for place in (1, 3, 5)]
    luminance = sum(weight * share for weight, share in zip((0.2126, 0.7152, 0.0722), shares, strict=True))
    return "#FFFFFF" if luminance < 0.179 else "#000000"  # where both contrasts are equal


def cells(drawing: Drawing, x: float, y: float, mask: list[list[bool]], side: float, fill: str) -> None:
    """A matrix of small squares by its mask: kept entries are filled, all have an edge.

    Args:
        drawing: What to draw on.
        x: Of the upper left corner.
        y: Of the upper left corner.
        mask: Row by row.
        side: Pixels of a square.
        fill: Colour of what is kept.
    """
    for i, row in enumerate(mask):
        for j, kept in enumerate(row):
            if kept:
                drawing.rectangle(x + j * side, y + i * side, side, side, fill)
    for i in range(len(mask) + 1):
        drawing.line(x, y + i * side, x + len(mask[0]) * side, y + i * side, 0.4)
    for j in range(len(mask[0]) + 1):
        drawing.line(x + j * side, y, x + j * side, y + len(mask) * side, 0.4)
