"""The one style of all pictures: safe colours, readable at a README's width, on light and on dark pages.

Backgrounds are transparent, and everything that is not data is drawn in INK, which has the same contrast to both.
"""

import io
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's, told apart by people with any common colour vision; without black, which dark pages swallow."""

LINES = ("-", "--", "-.", ":")
"""Line styles, which tell runs apart in grey."""

INK = "#797979"
"""Text, axes and grids: equally far from white and from the dark pages of code hosts."""

PAGES = ("#FFFFFF", "#0D1117")
"""A light and a dark page: what pictures must be readable on."""

WIDTH = 9.0
"""Inches of a picture. At a README's width of about 850 pixels, text of FONT_SIZE is as large as the page's."""

FONT_SIZE = 10
DPI = 160
_TITLE = 96  # characters of a line

_RC: dict[str, Any] = {
    "font.size": FONT_SIZE,
    "figure.titlesize": FONT_SIZE + 1,
    "axes.titlesize": FONT_SIZE,
    "axes.labelsize": FONT_SIZE,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": INK,
    "grid.alpha": 0.3,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "semisparse",  # equal pictures have equal files
}


@contextmanager
def figure(height: float) -> Iterator["Figure"]:
    """A figure in this style, WIDTH inches wide; draw and save it inside of the block.

    Args:
        height: Inches.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_RC):
        made = Figure(figsize=(WIDTH, height), layout="constrained")
        FigureCanvasAgg(made)
        yield made


def title(made: "Figure", text: str) -> None:
    """A title over the whole figure, in as many lines as it needs."""
    made.suptitle(textwrap.fill(text, _TITLE))


def png(made: "Figure") -> bytes:
    """The figure as a PNG; call it inside of figure()'s block."""
    image = io.BytesIO()
    made.savefig(image, format="png", dpi=DPI)
    return image.getvalue()


def line_style(number: int) -> dict[str, Any]:
    """Colour and line style of the line with this number."""
    return {"color": COLOURS[number % len(COLOURS)], "linestyle": LINES[number % len(LINES)]}


def legend_in(place: "Axes", source: "Axes", **options: Any) -> None:
    """A legend that has a panel for itself, so that it lies on no curve.

    Args:
        place: The panel for it, which is emptied.
        source: The panel whose lines it names.
        options: Of matplotlib's legend.
    """
    place.axis("off")
    place.legend(*source.get_legend_handles_labels(), loc="center left", fontsize="small", **options)
