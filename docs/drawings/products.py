"""The three products of a linear layer, and what each setting makes sparse: config.products, drawn."""

import torch

from docs.drawings.svg import WIDTH, Drawing, cells
from semisparse import SparseConfig
from semisparse.masks import MASKS
from semisparse_lab.report.style import COLOURS, INK

SETTINGS: dict[str, SparseConfig] = {
    'weight="transposable"': SparseConfig(),
    'weight="row"': SparseConfig(weight="row"),
    'activation="transposable", weight=None': SparseConfig(weight=None, activation="transposable"),
    'grad_output="mvue"': SparseConfig(grad_output="mvue"),
    'precision="fp8"': SparseConfig(precision="fp8"),
    'precision="fp8", grad_output="mvue"': SparseConfig(precision="fp8", grad_output="mvue"),
    'precision="fp8", weight=None': SparseConfig(precision="fp8", weight=None),
}
"""What is written -> the setting. Each is a row of the picture."""

PRODUCTS = {
    "forward": ("forward: y = x Wᵀ", ("x", "Wᵀ")),
    "grad_input": ("gradient dx = dy W", ("dy", "W")),
    "grad_weight": ("gradient dW = dyᵀ x", ("dyᵀ", "x")),
}
"""Key of config.products -> its heading and its two operands."""

LEFT, TOP, COLUMN, ROW, SIDE, ENTRIES = 238, 34, 204, 66, 5, 8


def pruned_as(config: SparseConfig, operand: str) -> str | None:
    """The mask of MASKS whose pattern an operand has; None for an operand that is not pruned.

    Args:
        config: The setting.
        operand: As in PRODUCTS.
    """
    if operand.startswith("W"):
        return config.weight
    if operand == "x":
        return config.activation
    return (
        "row" if operand == "dyᵀ" and config.grad_output else None
    )  # of each four tokens of dy, which lie along a row


def pattern(mask: str, transposed: bool) -> list[list[bool]]:
    """What a mask keeps of an example of ENTRIES x ENTRIES entries."""
    example = torch.arange(ENTRIES * ENTRIES).mul(37).remainder(101).sub(50).view(ENTRIES, ENTRIES).float()
    kept = MASKS[mask].choose(example)
    return (kept.mT if transposed else kept).tolist()


def draw() -> str:
    """The picture."""
    drawing = Drawing(
        "The three products of a linear layer and what each setting makes sparse", TOP + ROW * len(SETTINGS)
    )
    for place, (heading, _) in enumerate(PRODUCTS.values()):
        drawing.words(LEFT + place * COLUMN, 16, heading, bold=True)
    for row, (name, config) in enumerate(SETTINGS.items()):
        y = TOP + row * ROW
        drawing.line(0, y - 8, WIDTH, y - 8, 0.3)
        for line, part in enumerate(name.split(", ")):
            drawing.words(0, y + 24 + 18 * line, part + ("," if line < name.count(", ") else ""))
        for place, (product, (_, operands)) in enumerate(PRODUCTS.items()):
            _product(drawing, LEFT + place * COLUMN, y, config, product, operands)
    return str(drawing)


def _product(
    drawing: Drawing, x: float, y: float, config: SparseConfig, product: str, operands: tuple[str, str]
) -> None:
    how = config.products[product]
    sparse, size = how.startswith("sparse"), SIDE * ENTRIES
    colour = COLOURS[0] if sparse else INK
    for place, operand in enumerate(operands):
        left, mask = x + place * (size + 20), pruned_as(config, operand)
        if mask is None:
            drawing.rectangle(left, y, size, size, INK, 0.2, INK)
        else:
            cells(drawing, left, y, pattern(mask, transposed=operand == "Wᵀ"), SIDE, colour)
        name = operand if mask is None else {"W": "W~", "Wᵀ": "W~ᵀ", "dyᵀ": "S(dy)ᵀ", "x": "x~"}[operand]
        drawing.words(left + size / 2, y + size + 13, name, "middle", size=11)
    drawing.words(x + size + 10, y + size / 2 + 4, "\N{MULTIPLICATION SIGN}", "middle")
    kind, _, precision = how.partition(" fp8") if how.endswith("fp8") else (how, "", None)
    drawing.words(x + 2 * size + 32, y + size / 2 + 4, kind, fill=colour, bold=sparse)
    if precision is not None:
        drawing.words(x + 2 * size + 32, y + size / 2 + 20, "in fp8", size=11)
