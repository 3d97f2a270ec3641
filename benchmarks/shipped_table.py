"""The table of algorithms that the package ships, generated from the tuning in benchmarks/results; a test compares.

python benchmarks/shipped_table.py

A measured choice becomes a row for its own N and K and for half to twice its tokens. Where several results measured one
problem, the first by file name counts. A choice whose tuning left much unreached is left out.
"""

import json
from pathlib import Path
from typing import Any

from semisparse.gemm.race import NOT_REACHED

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "src" / "semisparse" / "gemm" / "shipped.json"
MOST_UNREACHED = 10
EXACT = ("gpu", "cusparselt", "dtype", "b_order", "d_order", "token_axis", "bias")


def row(key: dict[str, Any], choice: dict[str, Any]) -> dict[str, Any]:
    """A row of the table from one entry of Tuner.state."""
    sizes = {name: [key[name], key[name]] for name in ("rows", "reduction", "columns")}
    tokens = key[key["token_axis"]]
    sizes[key["token_axis"]] = [max(1, tokens // 2), 2 * tokens]
    chosen = {name: choice[name] for name in ("algorithm", "sparse_algorithm")}
    return {name: key[name] for name in EXACT} | sizes | chosen


def text() -> str:
    """The whole file."""
    rows: dict[str, str] = {}
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        for entry in json.loads(path.read_text()).get("tuning", {}).get("choices", []):
            unreached = [reason for reason in entry["choice"]["rejected"].values() if reason == NOT_REACHED]
            if len(unreached) <= MOST_UNREACHED and not entry["choice"]["note"]:
                made = row(entry["key"], entry["choice"])
                problem = {name: value for name, value in made.items() if "algorithm" not in name}
                rows.setdefault(json.dumps(problem), json.dumps(made))
    return '{\n "schema": 1,\n "rows": [\n  ' + ",\n  ".join(rows.values()) + "\n ]\n}\n"


if __name__ == "__main__":
    TARGET.write_text(text())
    print(TARGET.relative_to(ROOT))
