"""The picture of README: how many times faster than dense a step is, from the result files of benchmarks/results.

python benchmarks/picture.py

The SVG's metadata holds the figures and the files that it was drawn from; a test compares them with the results.
"""

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that the file runs as a script from anywhere

from benchmarks import tables
from benchmarks.store import ROOT, load
from semisparse_lab.report import style

TARGET = ROOT / "docs" / "img" / "speed.svg"
FASTER, SLOWER = style.COLOURS[:2]


def bars() -> list[dict[str, Any]]:
    """Label, ratio and file of every bar, fastest first: whole steps, and single layers where they lose."""
    steps = [(tables.label(result), result["ratio_to_dense"], result) for result in load("end-to-end")]
    losing = tables.losing_rows([*load("small-linear"), *load("linear")])
    rows = [*steps, *((name, ratio, result) for name, ratio, _, result in losing)]
    rows.sort(key=lambda row: -row[1])
    marks = ["" if tables.is_fresh(result) else tables.BESIDE for *_, result in rows]
    return [
        {"label": f"{name}{mark}", "ratio": round(ratio, 2), "file": result["file"]}
        for mark, (name, ratio, result) in zip(marks, rows, strict=True)
    ]


def write() -> None:
    """Draw the bars into TARGET."""
    shown = bars()
    ratios = [bar["ratio"] for bar in shown]
    with style.figure(0.34 * len(shown) + 0.9) as figure:
        axes = figure.subplots()
        drawn = axes.barh(
            [bar["label"] for bar in shown],
            [ratio - 1 for ratio in ratios],
            left=1,
            color=[FASTER if ratio > 1 else SLOWER for ratio in ratios],
        )
        axes.bar_label(drawn, [f"{ratio:.2f}x" for ratio in ratios], padding=4)
        axes.axvline(1, color=style.INK, linewidth=1)
        axes.set_xlim(min(0.8, min(ratios) - 0.12), max(ratios) + 0.12)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel(
            "time of a dense training step / time of a 2:4 step (right of 1: 2:4 is faster)"
            + (f"\n{tables.BESIDE}: dense timed beside 2:4, slower at the power limit" if _any_beside(shown) else "")
        )
        TARGET.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(TARGET, format="svg", metadata={"Date": None, "Description": json.dumps(shown)})


def _any_beside(shown: list[dict[str, Any]]) -> bool:
    return any(bar["label"].endswith(tables.BESIDE) for bar in shown)


if __name__ == "__main__":
    write()
    print(TARGET.relative_to(ROOT))
