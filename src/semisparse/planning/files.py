"""Plans as JSON files. A file may be damaged or foreign: everything of it is checked before it is used."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import torch

from semisparse.config import SparseConfig
from semisparse.documents import with_checksum, without_checksum
from semisparse.errors import PlanError, SemiSparseError
from semisparse.files import write_atomically
from semisparse.planning import problems
from semisparse.planning.candidates import DENSE
from semisparse.planning.contents import PlanContents, PlanRow
from semisparse.planning.packing import Packing
from semisparse.planning.store import machine, times
from semisparse.planning.timing import Mode, Times

SCHEMA = 3
"""Version of the file; others are not read."""

LARGEST = 16 * 2**20
"""Bytes of a file that is read; a layer takes about two thousand."""


def here() -> dict[str, str]:
    """Facts of this process that times depend on."""
    return machine(
        torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    )


def document(plan: PlanContents) -> dict[str, Any]:
    """A plan as JSON values, with a checksum of them.

    Args:
        plan: Any.
    """
    content = {
        "schema": SCHEMA,
        "mode": plan.mode,
        "machine": plan.machine,
        "candidates": {name: asdict(config) for name, config in plan.candidates.items()},
        "step": _record(plan.step),
        "predicted_ms": plan.predicted_ms,
        "host_weight": plan.host_weight,
        "remarks": list(plan.remarks),
        "by_layers_ms": plan.by_layers_ms,
        "packing": asdict(plan.packing),
        "rows": [_row_record(row) for row in plan.rows],
    }
    return with_checksum(content)


def write(path: Path, plan: PlanContents) -> None:
    """Write a plan; a reader sees the old file or the new one.

    Args:
        path: Of the file.
        plan: Any.

    Raises:
        OSError: It cannot be written.
    """
    text = json.dumps(document(plan), indent=1, allow_nan=False) + "\n"
    write_atomically(path, text.encode())


def read(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The fields of a plan without its rows, and the fields of each row.

    Args:
        path: Of the file.

    Raises:
        PlanError: There is no such file, or it is damaged or of another version's format.
    """
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise ValueError("it is not a regular file")  # reading a pipe would wait for ever
        if path.stat().st_size > LARGEST:
            raise ValueError(f"it has more than {LARGEST} bytes")
        content = without_checksum(json.loads(path.read_bytes()))
        if type(content["schema"]) is not int or content["schema"] != SCHEMA:
            raise ValueError(f"it has schema {content['schema']!r}, and this version reads {SCHEMA}")
        if content["mode"] not in get_args(Mode):
            raise ValueError(f"mode={content['mode']!r} is not one of {', '.join(get_args(Mode))}")
        candidates = {_text(name): SparseConfig(**fields) for name, fields in content["candidates"].items()}
        fields = {
            "mode": content["mode"],
            "candidates": candidates,
            "machine": {_text(name): _text(value) for name, value in content["machine"].items()},
            "step": _step(content["step"]),
            "predicted_ms": None if content["predicted_ms"] is None else _positive(content["predicted_ms"]),
            "host_weight": _number(content["host_weight"]),
            "remarks": tuple(_text(remark) for remark in content["remarks"]),
            "by_layers_ms": _number(content["by_layers_ms"]),
            "packing": Packing(**content["packing"]),
        }
        rows = [_row(record, candidates) for record in content["rows"]]
        names = [row["name"] for row in rows]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"the layer {twice!r} is in it twice")
        return fields, rows
    except OSError as error:
        raise PlanError(f"path={str(path)!r}: the plan cannot be read: {error}") from error
    except (AttributeError, KeyError, OverflowError, RecursionError, SemiSparseError, TypeError, ValueError) as error:
        raise PlanError(
            f"path={str(path)!r} holds no plan that can be used ({type(error).__name__}: {error}): make it anew with "
            "semisparse.plan(...).save"
        ) from error


def _row_record(row: PlanRow) -> dict[str, Any]:
    return {
        "name": row.name,
        "in_features": row.in_features,
        "out_features": row.out_features,
        "calls": [{"problem": problem.to_record(), "calls": count} for problem, count in row.calls],
        "choice": row.choice,
        "times": {name: _record(one) for name, one in row.times.items()},
        "shared": _record(row.shared),
        "why": row.why,
        "dropped": row.dropped,
    }


def _row(record: Mapping[str, Any], candidates: Mapping[str, SparseConfig]) -> dict[str, Any]:
    choice, measured = _text(record["choice"]), {_text(name): times(one) for name, one in record["times"].items()}
    if choice != DENSE and not {choice, DENSE} <= measured.keys():
        raise ValueError(f"{record['name']!r} chooses {choice!r}, of which there are no times")
    if not measured.keys() <= {DENSE, *candidates}:
        raise ValueError(f"{record['name']!r} has times of {sorted(measured)}, and candidates are {sorted(candidates)}")
    return {
        "name": _text(record["name"]),
        "in_features": _size(record["in_features"]),
        "out_features": _size(record["out_features"]),
        "calls": tuple((problems.from_record(call["problem"]), _positive(call["calls"])) for call in record["calls"]),
        "choice": choice,
        "config": None if choice == DENSE else candidates[choice],
        "times": measured,
        "shared": None if record["shared"] is None else times(record["shared"]),
        "why": _text(record["why"]),
        "dropped": {_text(name): _text(why) for name, why in record["dropped"].items()},
    }


def _step(record: Mapping[str, Any] | None) -> Times | None:
    step = None if record is None else times(record)
    if step is not None and step.ms <= 0:
        raise ValueError(f"a step takes {step.ms!r} ms")
    return step


def _record(found: Times | None) -> dict[str, Any] | None:
    return None if found is None else asdict(found)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is no text")
    value.encode()  # half of a pair of surrogates cannot be printed
    return value


def _size(value: object) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no size")
    return value


def _number(value: object) -> float | None:
    if value is None:
        return None
    if type(value) not in (int, float) or not abs(float(value)) < float("inf"):  # type: ignore[arg-type]
        raise ValueError(f"{value!r} is no number")
    return float(value)  # type: ignore[arg-type]


def _positive(value: object) -> float:
    number = _number(value)
    if number is None or number <= 0:
        raise ValueError(f"{value!r} is no positive number")
    return number
