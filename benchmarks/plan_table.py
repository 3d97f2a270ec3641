"""Times of single layers that the package ships for `semisparse plan`, from benchmarks/results; a test compares.

python benchmarks/plan_table.py

Where several results measured one layer on one GPU, the first by file name counts.
"""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "src" / "semisparse" / "planning" / "shipped.json"
COMPILED = "neighbours"
KINDS = ("compare-linear", "linear", "small-linear", COMPILED)
TITLES = {
    "dense": "dense",
    "dense bf16": "dense",
    "dense fp8": "dense fp8",
    "semisparse weight": "2:4",
    "2:4": "2:4",
    "semisparse weight + mvue": "2:4 + mvue",
    "2:4 + mvue": "2:4 + mvue",
    "fp8 + 2:4": "fp8 + 2:4",
    "fp8 + 2:4 + mvue": "fp8 + 2:4 + mvue",
}
"""Title of a row in a result -> name of the candidate."""
MODES = {"eager": "", "graph": "graph: "}
ALONE = "neighbours alone"
"""In a compiled result, the pointwise operations around the layer, which are taken off."""


def layers(result: dict[str, Any]) -> list[dict[str, Any]]:
    """One entry per mode of a result."""
    facts, measured = result["provenance"]["environment"]["facts"], result["times_ms"]
    modes = {"compiled": ""} if result["kind"] == COMPILED else MODES
    alone = measured[ALONE]["median_ms"] if result["kind"] == COMPILED else 0.0
    found = []
    for mode, prefix in modes.items():
        titles = [title for title in TITLES if f"{prefix}{title}" in measured]
        ms = {TITLES[title]: round(measured[f"{prefix}{title}"]["median_ms"] - alone, 4) for title in titles}
        if "dense" in ms and len(ms) > 1:
            source = result["provenance"]
            where = {"gpu": source["gpu"], "torch": facts["torch"], "measured": source["time"][:10]}
            found.append({**where, "mode": mode, "mkn": result["mkn"], "ms": ms})
    return found


def text() -> str:
    """The whole file."""
    entries: dict[tuple[Any, ...], str] = {}
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        result = json.loads(path.read_text())
        if result.get("kind") in KINDS and not result.get("toy"):
            for entry in layers(result):
                entries.setdefault((entry["gpu"], entry["mode"], *entry["mkn"]), json.dumps(entry))
    return '{\n "schema": 1,\n "layers": [\n  ' + ",\n  ".join(entries.values()) + "\n ]\n}\n"


if __name__ == "__main__":
    TARGET.write_text(text())
    print(TARGET.relative_to(ROOT))
