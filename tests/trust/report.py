"""The record of the trust suite, and its table, which tests/reliability.py writes into docs/reliability.md."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.origin import origin
from tests.trust.outcome import ITEMS

RECORD = Path(__file__).with_name("record.json")
NONE = "No run on a GPU is recorded yet."

Document = dict[str, Any]


def merged(record: Document | None, runs: Sequence[Document]) -> Document:
    """A record with the parts of more runs.

    Args:
        record: What there is; None for nothing.
        runs: As `python -m tests.trust` writes them. Quick ones are refused: their sizes say little.

    Returns:
        The parts in the order of the suite.

    Raises:
        ValueError: A run is no whole run of this suite.
    """
    parts = {} if record is None else {part["name"]: part for part in record["parts"]}
    for run in runs:
        if run.get("kind") != "trust" or run.get("quick") is not False:
            raise ValueError(f"kind {run.get('kind')!r}, quick {run.get('quick')!r}: no whole run of the trust suite")
        parts |= {part["name"]: {**_ended(part), "provenance": run["provenance"]} for part in run["parts"]}
    order = list(ITEMS)
    return {"kind": "trust", "parts": sorted(parts.values(), key=lambda part: order.index(part["name"]))}


def _ended(part: Document) -> Document:
    """A part; one whose run was killed was not done."""
    return {**part, "outcome": "raised", "reason": "the run was killed"} if part["outcome"] == "running" else part


def table(record: Document | None) -> str:
    """What was found as a table, with the machine under it.

    Args:
        record: As merged gives it; None where nothing was run.
    """
    if record is None:
        return NONE
    lines = ["| plan | what | size | figure | limit | holds |", "| --- | --- | --- | ---: | ---: | --- |"]
    for part in record["parts"]:
        for row in part["rows"]:
            limit = "" if row["limit"] is None else f"{row['rule']} {_number(row['limit'])}"
            holds = "reported" if row["rule"] == "reported" else "yes" if row["passed"] else "**no**"
            lines.append(
                f"| {row['item']} | {row['what']} | {row['size']} | {_number(row['figure'])} | {limit} | {holds} |"
            )
    others = [
        f"- {part['name']}: {part['outcome']}, {part['reason']}"
        for part in record["parts"]
        if part["outcome"] != "done"
    ]
    return "\n".join([*lines, "", *others, *([""] if others else []), origin(record["parts"])])


def _number(value: float | None) -> str:
    """Integers with separators, others with three digits."""
    if value is None:
        return "not finite"
    return f"{int(value):,}" if float(value).is_integer() else f"{value:.3g}"


def read(path: Path) -> Document | None:
    """A document, or None where there is no file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def add(runs: Sequence[Document]) -> None:
    """Add runs to the record.

    Args:
        runs: As merged takes them.

    Raises:
        ValueError: As merged.
    """
    RECORD.write_text(json.dumps(merged(read(RECORD), runs), indent=1) + "\n", encoding="utf-8")
