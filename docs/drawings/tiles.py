"""The 90 tiles of the transposable mask, and the one that is chosen for an example."""

import torch

from docs.drawings.svg import Drawing, cells, on
from semisparse.pattern import GROUP, TRANSPOSABLE_TILES
from semisparse.reference.masks import transposable_codes
from semisparse_lab.report.style import COLOURS, INK

EXAMPLE = torch.tensor([[9, 7, 1, 2], [8, 3, 6, 1], [7, 2, 2, 5], [1, 4, 3, 6]], dtype=torch.float32)
"""Magnitudes of a tile. The two largest of each row would keep three entries of its first column."""

ACROSS, SIDE, PITCH, LEFT, TOP, LARGE = 15, 7, 40, 252, 32, 44


def tile(code: int) -> list[list[bool]]:
    """Which entries a tile keeps, row by row."""
    return [[bool(code >> GROUP * i + j & 1) for j in range(GROUP)] for i in range(GROUP)]


def chosen() -> int:
    """The code of the tile that keeps most of EXAMPLE."""
    return int(transposable_codes(EXAMPLE).item())


def draw() -> str:
    """The picture."""
    down = -(-len(TRANSPOSABLE_TILES) // ACROSS)
    drawing = Drawing(f"The {len(TRANSPOSABLE_TILES)} transposable tiles", TOP + down * PITCH)
    best, code = tile(chosen()), chosen()
    drawing.words(0, 16, "magnitudes of one tile", bold=True)
    cells(drawing, 0, TOP, best, LARGE, COLOURS[0])
    for i, row in enumerate(EXAMPLE.int().tolist()):
        for j, value in enumerate(row):
            drawing.words(
                (j + 0.5) * LARGE,
                TOP + (i + 0.5) * LARGE + 5,
                str(value),
                "middle",
                on(COLOURS[0]) if best[i][j] else INK,
            )
    kept = int(EXAMPLE[torch.tensor(best)].sum())
    drawing.words(0, TOP + GROUP * LARGE + 24, f"the best tile keeps {kept} of {int(EXAMPLE.sum())}")
    drawing.words(LEFT, 16, f"all {len(TRANSPOSABLE_TILES)}: 2 kept in each row and in each column", bold=True)
    for number, one in enumerate(TRANSPOSABLE_TILES):
        x, y = LEFT + number % ACROSS * PITCH, TOP + number // ACROSS * PITCH
        cells(drawing, x, y, tile(one), SIDE, COLOURS[0] if one == code else INK)
        if one == code:
            drawing.rectangle(x - 4, y - 4, GROUP * SIDE + 8, GROUP * SIDE + 8, stroke=COLOURS[1])
    return str(drawing)
