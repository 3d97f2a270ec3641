"""Choices that ship with the package, for when tuning may not run: switched off, deterministic, or a cold capture.

shipped.json holds {"schema": 1, "rows": [...]}, made from benchmark results, never by hand. A row applies when all of
its conditions do; the first that applies is taken. Its fields, all required:

    gpu          GPU name as torch.cuda reports it
    cusparselt   library version, for instance 800: algorithm ids change between versions
    dtype        "float16" or "bfloat16"
    b_order, d_order, token_axis    as in Problem
    bias         true or false
    rows, reduction, columns        shape class: [smallest, largest], both included
    algorithm    id to run, or null for masked dense
    sparse_algorithm                fastest right id, or null
"""

import json
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any

from semisparse.gemm.choice import Choice, from_record

SCHEMA = 1
_EXACT = {"gpu": str, "cusparselt": int, "dtype": str, "b_order": str, "d_order": str, "token_axis": str, "bias": bool}
_RANGES = ("rows", "reduction", "columns")
_CHOSEN = ("algorithm", "sparse_algorithm")


def parse(text: str) -> tuple[dict[str, Any], ...]:
    """The rows of a table, each with its Choice under "choice". Raises ValueError that names the row and the field."""
    table = json.loads(text)
    whole = isinstance(table, dict) and set(table) == {"schema", "rows"} and isinstance(table["rows"], list)
    if not whole or type(table["schema"]) is not int or table["schema"] != SCHEMA:
        raise ValueError(f"the table must be {{'schema': {SCHEMA}, 'rows': [...]}}")
    return tuple(_checked(row, number) for number, row in enumerate(table["rows"]))


def _checked(row: Any, number: int) -> dict[str, Any]:
    if not isinstance(row, dict) or set(row) != {*_EXACT, *_RANGES, *_CHOSEN}:
        raise ValueError(f"row {number} must have exactly the fields {', '.join((*_EXACT, *_RANGES, *_CHOSEN))}")
    for name, kind in _EXACT.items():
        if type(row[name]) is not kind:
            raise ValueError(f"row {number}: {name}={row[name]!r} is no {kind.__name__}")
    for name in _RANGES:
        bounds = row[name]
        ints = isinstance(bounds, list) and len(bounds) == 2 and all(type(bound) is int for bound in bounds)
        if not ints or not 1 <= bounds[0] <= bounds[1]:
            raise ValueError(f"row {number}: {name}={bounds!r} is no [smallest, largest]")
    unmeasured: dict[str, Any] = {"sparse_us": None, "dense_us": None, "rejected": {}, "note": ""}
    return row | {"choice": from_record({name: row[name] for name in _CHOSEN} | unmeasured, "shipped")}


def find(rows: tuple[dict[str, Any], ...], key: Mapping[str, object]) -> Choice | None:
    """The first row's choice whose conditions a tuning key (tuner.Tuner.key) meets, or None."""
    for row in rows:
        exact = all(row[name] == key.get(name) for name in _EXACT)
        if exact and all(row[name][0] <= int(str(key[name])) <= row[name][1] for name in _RANGES):
            choice: Choice = row["choice"]
            return choice
    return None


@cache
def table() -> tuple[dict[str, Any], ...]:
    """The rows that this package ships, read once."""
    return parse(resources.files("semisparse.gemm").joinpath("shipped.json").read_text(encoding="utf-8"))
