"""The choices that the package ships, generated from the tuning in benchmarks/results; a test compares.

python benchmarks/shipped_table.py

Where several results measured one problem, the first by file name counts. A choice whose tuning left much unreached is
left out.
"""

import json
from pathlib import Path
from typing import Any

from semisparse.gemm.autotune.selection import NOT_REACHED
from semisparse.gemm.autotune.store import SCHEMA

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "src" / "semisparse" / "gemm" / "autotune" / "shipped.json"
MOST_UNREACHED = 10
CONDITIONS = (
    "gpu", "cusparselt", "dtype", "out_dtype", "b_order", "d_order", "token_axis", "bias", "rows", "reduction",
    "columns", "way", "tokens", "out_features", "in_features",
)  # fmt: skip


def is_complete(choice: dict[str, Any]) -> bool:
    """Whether a tuning run was undisturbed and reached nearly all algorithms."""
    unreached = [reason for reason in choice["rejected"].values() if reason == NOT_REACHED]
    return len(unreached) <= MOST_UNREACHED and not choice["note"]


def text() -> str:
    """The whole file."""
    choices: dict[str, str] = {}
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        for entry in json.loads(path.read_text()).get("tuning", {}).get("choices", []):
            key = {name: entry["key"][name] for name in CONDITIONS if name in entry["key"]}
            names = ("algorithm", "sparse_algorithm", "chunk", "decides")
            choice = {name: entry["choice"][name] for name in names if name in entry["choice"]}
            if is_complete(entry["choice"]):
                choices.setdefault(json.dumps(key), json.dumps({"key": key, "choice": choice}))
    return f'{{\n "schema": {SCHEMA},\n "choices": [\n  ' + ",\n  ".join(choices.values()) + "\n ]\n}\n"


if __name__ == "__main__":
    TARGET.write_text(text())
    print(TARGET.relative_to(ROOT))
