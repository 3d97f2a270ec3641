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

GROUP_OF = {kind: name for name, (_, _, kinds) in GROUPS.items() for kind in kinds}
Segment = tuple[float, float, str]
"""Start and end in milliseconds, and which of GROUPS."""

LEFT, TOP, BAR, ROW, TICK = 132, 30, 34, 52, 20


def profile() -> dict[str, Any]:
    """The stored profile."""
    return json.loads((RESULTS / FILE).read_text())


def spent(row: dict[str, Any]) -> dict[str, float]:
    """Milliseconds of a profiled row by GROUPS."""
    found: Counter[str] = Counter(by_kind(row))
    return {name: sum(found[kind] for kind in kinds) for name, (_, _, kinds) in GROUPS.items()}


def in_order(result: dict[str, Any]) -> bool:
    """Whether a profile says when its kernels ran; earlier ones hold their sums alone."""
    return all(row.get("timeline") for row in result["rows"].values())


def segments(row: dict[str, Any]) -> list[Segment]:
    """What is drawn of a profiled row: its kernels as they ran, or their sums by GROUPS behind each other."""
    if timeline := row.get("timeline"):
        return [(start, end, GROUP_OF[kind]) for start, end, kind in timeline]
    found, at = [], 0.0
    for group, milliseconds in spent(row).items():
        found.append((at, at + milliseconds, group))
        at += milliseconds
    return found


def ends(row: list[Segment]) -> float:
    """Milliseconds at which the last kernel ends."""
    return max(end for _, end, _ in row)


def draw() -> str:
    """The picture."""
    assert {kind for _, _, kinds in GROUPS.values() for kind in kinds} == {OTHER, *(kind for kind, _ in KINDS)}
    result = profile()
    rows = {name: segments(row) for name, row in result["rows"].items()}
    bottom = TOP + len(rows) * ROW
    scale = (WIDTH - LEFT - 60) / max(ends(row) for row in rows.values())
    drawing = Drawing("A training step on the axis of time, dense against sparse", bottom + 74)
    order = "as they ran" if in_order(result) else "added up by kind"
    drawing.words(0, 14, f"one training step of a {result['label']}, {gpu(result)}: kernels {order}", bold=True)
    for tick in range(0, int((WIDTH - LEFT) / scale) + 1, TICK):
        drawing.line(LEFT + tick * scale, TOP - 6, LEFT + tick * scale, bottom, 0.3)
        drawing.words(LEFT + tick * scale, bottom + 14, f"{tick} ms" if tick == 0 else str(tick), "middle", size=11)
    for number, (name, row) in enumerate(rows.items()):
        y = TOP + number * ROW
        drawing.words(0, y + BAR / 2 + 4, name)
        for start, end, group in row:
            colour, opacity, _ = GROUPS[group]
            x, width = LEFT + start * scale, (end - start) * scale
            drawing.rectangle(x, y, width, BAR, colour, opacity)
            if width > 24:
                inside = on(colour) if opacity == 1 else INK
                drawing.words(x + width / 2, y + BAR / 2 + 4, f"{end - start:.0f}", "middle", inside, 11)
        drawing.words(LEFT + ends(row) * scale + 6, y + BAR / 2 + 4, f"{ends(row):.1f}", bold=True)
    _legend(drawing, bottom + 30)
    return str(drawing)


def _legend(drawing: Drawing, y: float) -> None:
    for number, (name, (colour, opacity, _)) in enumerate(GROUPS.items()):
        x, line = (number % 3) * 290, y + number // 3 * 22
        drawing.rectangle(x, line, 14, 14, colour, opacity)
        drawing.words(x + 20, line + 12, name)
