"""Writes the record of the planted defects into docs/reliability.md: python tests/defects/report.py"""

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "reliability.md"
RECORD = Path(__file__).with_name("record.json")
BEGIN, END = "<!-- defects: generated from tests/defects/record.json -->", "<!-- end of defects -->"

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


def page(text: str, record: dict[str, Any]) -> str:
    """The page with the table of a record.

    Args:
        text: The page before.
        record: As run.py writes it.
    """
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{table(record)}\n{END}{rest.split(END)[1]}"


def main() -> int:
    """Write the page.

    Returns:
        Exit code.
    """
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), record), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
