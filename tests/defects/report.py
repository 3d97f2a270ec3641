"""The record of the planted defects as a table; tests/reliability.py writes it into docs/reliability.md."""

from pathlib import Path
from typing import Any

RECORD = Path(__file__).with_name("record.json")

WHERE = {
    "masks": "masks and the pattern", "reference": "reference of linear layers, sampling and fp8",
    "formats": "layout of packed matrices", "kernels": "Triton kernels", "gemm": "engine, tuning and problems",
    "layers": "layers, autograd and packings", "training": "schedules, recipes and ranks",
    "planning": "plans, files and surgery", "native": "native layer (C++)",
}  # fmt: skip


def table(record: dict[str, Any]) -> str:
    """The outcomes by list as a table, and the names of what survived."""
    lines = ["| planted in | defects | killed |", "| --- | ---: | ---: |"]
    for listed in dict.fromkeys(row["list"] for row in record["defects"]):
        rows = [row for row in record["defects"] if row["list"] == listed]
        lines.append(f"| {WHERE.get(listed, listed)} | {len(rows)} | {sum(row['killed'] for row in rows)} |")
    lines.append(f"| **all** | **{record['total']}** | **{record['killed']}** |")
    survived = [f"- survived: {name}" for name in record["survived"]] or ["None survived."]
    return "\n".join([*lines, "", *survived])
