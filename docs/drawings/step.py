"""A training step on the axis of time, dense against sparse, from the file of a profile."""

import json
from collections import Counter
from typing import Any

from benchmarks.origin import gpu
from benchmarks.step_profile import KINDS, OTHER, by_kind
from benchmarks.store import RESULTS
from docs.drawings.svg import WIDTH, Drawing, on
from semisparse_lab.report.style import COLOURS, INK

FILE = "profile-llama-4096.json"

GROUPS: dict[str, tuple[str, float, tuple[str, ...]]] = {
    "dense products": (COLOURS[0], 1, ("dense products",)),
    "dense fp8 products": (COLOURS[3], 1, ("dense fp8 products",)),
    "sparse products": (COLOURS[2], 1, ("sparse products",)),
    "pruning, packing, rounding, sampling": (
        COLOURS[1],
        1,
        ("largest magnitudes", "rounding to e4m3", "rescaling", "pruning and packing", "sampling"),
    ),
    "attention": (INK, 1, ("attention",)),
    "optimizer, pointwise, everything else": (INK, 0.2, ("optimizer", "fused pointwise and reductions", OTHER)),
}
"""Name in the picture -> colour, opacity, and the kinds of kernels in it. Grey is what sparsity leaves alone."""

LEFT, TOP, BAR, ROW, TICK = 132, 30, 34, 52, 20


def profile() -> dict[str, Any]:
    """The stored profile."""
    return json.loads((RESULTS / FILE).read_text())


def spent(row: dict[str, Any]) -> dict[str, float]:
    """Milliseconds of a profiled row by GROUPS."""
    found: Counter[str] = Counter(by_kind(row))
    return {name: sum(found[kind] for kind in kinds) for name, (_, _, kinds) in GROUPS.items()}


def draw() -> str:
    """The picture."""
    assert {kind for _, _, kinds in GROUPS.values() for kind in kinds} == {OTHER, *(kind for kind, _ in KINDS)}
    result = profile()
    rows = {name: spent(row) for name, row in result["rows"].items()}
    bottom = TOP + len(rows) * ROW
    scale = (WIDTH - LEFT - 60) / max(sum(times.values()) for times in rows.values())
    drawing = Drawing("A training step on the axis of time, dense against sparse", bottom + 74)
    drawing.words(
        0, 14, f"one training step of a {result['label']}, {gpu(result)}: kernels added up by kind", bold=True
    )
    for tick in range(0, int((WIDTH - LEFT) / scale) + 1, TICK):
        drawing.line(LEFT + tick * scale, TOP - 6, LEFT + tick * scale, bottom, 0.3)
        drawing.words(LEFT + tick * scale, bottom + 14, f"{tick} ms" if tick == 0 else str(tick), "middle", size=11)
    for number, (name, times) in enumerate(rows.items()):
        y, x = TOP + number * ROW, float(LEFT)
        drawing.words(0, y + BAR / 2 + 4, name)
        for group, milliseconds in times.items():
            colour, opacity, _ = GROUPS[group]
            width = milliseconds * scale
            drawing.rectangle(x, y, width, BAR, colour, opacity)
            if width > 24:
                inside = on(colour) if opacity == 1 else INK
                drawing.words(x + width / 2, y + BAR / 2 + 4, f"{milliseconds:.0f}", "middle", inside, 11)
            x += width
        drawing.words(x + 6, y + BAR / 2 + 4, f"{sum(times.values()):.1f}", bold=True)
    _legend(drawing, bottom + 30)
    return str(drawing)


def _legend(drawing: Drawing, y: float) -> None:
    for number, (name, (colour, opacity, _)) in enumerate(GROUPS.items()):
        x, line = (number % 3) * 290, y + number // 3 * 22
        drawing.rectangle(x, line, 14, 14, colour, opacity)
        drawing.words(x + 20, line + 12, name)
