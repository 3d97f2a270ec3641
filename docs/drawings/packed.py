"""The packed format: values and metadata of a small matrix, as the library's op packs it."""

from fractions import Fraction

import torch
from torch import Tensor

import semisparse.ops
from docs.drawings.svg import WIDTH, Drawing, on
from semisparse.formats.layout import packed_bytes, sm90_layout
from semisparse.pattern import GROUP, KEPT, Packed
from semisparse_lab.report.style import COLOURS, INK

SIZE, SHOWN, DTYPE = 16, 4, torch.bfloat16
LARGE = 4096
SIDE, TOP, GAP = 36, 32, 44


def example() -> Tensor:
    """A matrix of SIZE x SIZE whole numbers, none of them zero."""
    numbers = torch.arange(SIZE * SIZE).mul(29).remainder(19).sub(9)
    return torch.where(numbers == 0, 9, numbers).view(SIZE, SIZE).to(DTYPE)


def packed() -> Packed:
    """Values and nibbles of the example's buffer, transposable mask."""
    buffer, _ = semisparse.ops.pack(example(), DTYPE, "transposable")
    return sm90_layout(DTYPE).decode(buffer, SIZE, SIZE, DTYPE)


def share() -> Fraction:
    """Bytes of a large packed matrix over those of the dense one."""
    return Fraction(packed_bytes(LARGE, LARGE, DTYPE.itemsize), LARGE * LARGE * DTYPE.itemsize)


def draw() -> str:
    """The picture: the first rows of the matrix, and below them what is stored of these rows."""
    below = TOP + SHOWN * SIDE + GAP
    drawing = Drawing("A small matrix, its values and its metadata", below + SHOWN * SIDE + 32)
    found, matrix = packed(), example()
    values, nibbles = found.values.int().tolist(), found.nibbles.tolist()
    drawing.words(
        0, 16, f"the first {SHOWN} rows of a {SIZE} x {SIZE} matrix; what the mask keeps is coloured", bold=True
    )
    drawing.words(0, below - 16, "values: what is kept, in order", bold=True)
    meta = KEPT * SIZE // GROUP * SIDE + GAP
    drawing.words(meta, below - 16, "metadata: 4 bits for each group of four", bold=True)
    width = (WIDTH - meta) / (SIZE // GROUP)
    for i in range(SHOWN):
        for group in range(SIZE // GROUP):
            colour, nibble, y = COLOURS[group], nibbles[i][group], below + i * SIDE
            kept = (nibble & GROUP - 1, nibble >> KEPT)
            for j in range(GROUP):
                column = GROUP * group + j
                number = str(int(matrix[i, column]))
                _cell(drawing, column * SIDE + group * 8, TOP + i * SIDE, SIDE, number, colour if j in kept else None)
            for slot in range(KEPT):
                column = KEPT * group + slot
                _cell(drawing, column * SIDE, y, SIDE, str(values[i][column]), colour)
            _cell(drawing, meta + group * width, y, width - 2, f"{kept[0]}, {kept[1]}: {nibble:04b}", colour)
    drawing.words(
        0,
        below + SHOWN * SIDE + 24,
        f"A {LARGE} x {LARGE} matrix in bf16 takes {LARGE * LARGE * DTYPE.itemsize:,} bytes; packed, "
        f"{packed_bytes(LARGE, LARGE, DTYPE.itemsize):,}: {share()} of that.",
    )
    return str(drawing)


def _cell(drawing: Drawing, x: float, y: float, width: float, text: str, colour: str | None) -> None:
    if colour is None:
        drawing.rectangle(x, y, width, SIDE, INK, 0.08, INK)
    else:
        drawing.rectangle(x, y, width, SIDE, colour, 1, INK)
    drawing.words(x + width / 2, y + SIDE / 2 + 5, text, "middle", INK if colour is None else on(colour))
