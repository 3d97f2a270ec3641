"""Draws the pictures of docs/how_it_works.md: python docs/draw.py

Each shows facts that the library or a result file states. A test compares the stored pictures with what is drawn.
"""

import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "src"), str(ROOT / "lab" / "src")]  # so that the file runs as a script

from docs.drawings import packed, products, step, tiles  # noqa: E402

FOLDER = ROOT / "docs" / "img"
PICTURES: dict[str, Callable[[], str]] = {
    "products": products.draw,
    "tiles": tiles.draw,
    "packed": packed.draw,
    "step": step.draw,
}
"""Name of the file without .svg -> what draws it."""

if __name__ == "__main__":
    for name, draw in PICTURES.items():
        (FOLDER / f"{name}.svg").write_text(draw())
        print((FOLDER / f"{name}.svg").relative_to(ROOT))
