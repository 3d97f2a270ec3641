"""The record of the faults as a table; tests/reliability.py writes it into docs/reliability.md."""

from pathlib import Path
from typing import Any

RECORD = Path(__file__).with_name("record.json")


def table(record: dict[str, Any]) -> str:
    """The outcomes by item: size, what was counted, what must hold and whether it did; then limits and failures."""
    lines = ["| fault | size | counted | must hold | pass |", "| --- | --- | --- | --- | --- |"]
    limits = dict[str, None]()
    for item in dict.fromkeys(row["item"] for row in record["faults"]):
        rows = [row for row in record["faults"] if row["item"] == item]
        counts = dict[str, int]()
        for row in rows:
            for what, count in row["counts"].items():
                longest = what.startswith("ms ")
                counts[what] = max(counts.get(what, 0), count) if longest else counts.get(what, 0) + count
        sizes = f"{rows[0]['size']:,} {rows[0]['unit']}"
        size = f"{len(rows)} x {sizes}" if len(rows) > 1 else sizes
        counted = ", ".join(f"{count:,} {what}" for what, count in counts.items() if count) or "nothing wrong"
        holds = " <br> ".join(dict.fromkeys(row["holds"] for row in rows))
        passed = "yes" if all(row["passed"] for row in rows) else "NO"
        lines.append(f"| {item} | {size} | {counted} | {holds} | {passed} |")
        limits |= dict.fromkeys(f"- {item}: {row['limit']}." for row in rows if row["limit"])
    failed = [f"- failed: {row['title']}: {row['error']}" for row in record["faults"] if not row["passed"]]
    return "\n".join([*lines, "", "Known limits:", "", *limits, *failed])
