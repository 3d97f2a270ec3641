"""Lets faults happen and counts what came of them; the record, and the table of docs/reliability.md from it.

    python tests/faults/run.py                        # at the size of a night; the outcomes go into record.json
    python tests/faults/run.py --only killing disk    # by module or by a part of the name
    python tests/faults/run.py --size change --keep-record

A fault that is not tried keeps its last outcome in the record.
"""

import argparse
import gc
import json
import logging
import os
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "src"), str(ROOT / "lab" / "src")]
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402

from tests.faults.fault import Fault, Outcome, tried  # noqa: E402

MODULES = (
    "damage",
    "killing",
    "disk",
    "clocks",
    "training",
    "forking",
    "engine",
    "writers",
    "ranks",
    "resharding",
    "use",
)
RECORD = Path(__file__).with_name("record.json")
SCHEMA = 1


def faults() -> list[tuple[str, Fault]]:
    """Every fault with the module that it stands in."""
    torch.set_num_threads(1)
    return [(module, fault) for module in MODULES for fault in import_module(f"tests.faults.{module}").FAULTS]


def document(outcomes: list[Outcome], before: dict[str, Any]) -> dict[str, Any]:
    """The record as JSON values: the last outcome of each fault.

    Args:
        outcomes: Of this run.
        before: The record so far, or nothing.
    """
    last = {row["title"]: row for row in before.get("faults", [])}
    for one in outcomes:
        last[one.fault.title] = {
            "title": one.fault.title,
            "item": one.fault.item,
            "size": one.size,
            "unit": one.fault.unit,
            "holds": one.fault.holds,
            "limit": one.fault.limit,
            "passed": one.passed,
            "error": one.error,
            "counts": one.counts,
            "seconds": round(one.seconds, 1),
            "torch": str(torch.__version__),
        }
    rows = [last[fault.title] for _, fault in faults() if fault.title in last]
    return {"schema": SCHEMA, "failed": [row["title"] for row in rows if not row["passed"]], "faults": rows}


def main() -> int:
    """The command line.

    Returns:
        Exit code: 0 if all held, else 1.
    """
    parser = argparse.ArgumentParser(description="Let faults happen, and see whether what is promised holds.")
    parser.add_argument("--only", nargs="+", help="faults whose module is, or whose name contains one of these")
    parser.add_argument("--size", choices=("change", "nightly"), default="nightly")
    parser.add_argument("--keep-record", action="store_true", help=f"do not write {RECORD.name}")
    asked = parser.parse_args()
    begin, outcomes = time.monotonic(), []
    chosen = [
        fault
        for module, fault in faults()
        if fault.size(asked.size)
        and (not asked.only or module in asked.only or any(part in fault.title for part in asked.only))
    ]
    logging.getLogger("semisparse").setLevel(logging.ERROR)  # a file that is ignored is logged each time
    gc.collect()
    gc.freeze()  # what is there is not walked in processes that are forked
    for number, fault in enumerate(chosen, 1):
        one = tried(fault, fault.size(asked.size))
        outcomes.append(one)
        told = one.error or ", ".join(f"{count} {what}" for what, count in one.counts.items())
        held = "held" if one.passed else "FAILED"
        print(f"{number:3}/{len(chosen)} {held:6} {one.seconds:5.1f} s  {fault.title}, {one.size} {fault.unit}: {told}",
              flush=True)  # fmt: skip
    if not asked.keep_record:
        before = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
        RECORD.write_text(json.dumps(document(outcomes, before), indent=1) + "\n", encoding="utf-8")
    failed = sum(not one.passed for one in outcomes)
    print(f"faults: {len(outcomes) - failed} held, {failed} failed; {time.monotonic() - begin:.0f} s")
    return 1 if failed or not outcomes else 0


if __name__ == "__main__":
    sys.exit(main())
