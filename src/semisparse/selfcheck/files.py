"""Self-checks as JSON. A file may come from anyone: all of it is checked before anything is shown or counted."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from semisparse.documents import with_checksum, without_checksum
from semisparse.errors import BenchError
from semisparse.files import write_atomically
from semisparse.gemm.autotune.algorithm import Source, from_record
from semisparse.planning import problems, store
from semisparse.selfcheck.contents import (
    Check,
    Gpu,
    LayerTimes,
    Layout,
    LayoutOutcome,
    ModelTimes,
    Outcome,
    Part,
    PartOutcome,
    Report,
)

KIND, SCHEMA = "bench", 1
"""What the file is, and the version of its format; others are not read."""

LARGEST = 4 * 2**20
"""Bytes of a file that is read; a whole one has about 60,000."""

_LONGEST_TEXT, _LONGEST_LIST = 1000, 1000
_STARTED = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")


def document(report: Report) -> dict[str, Any]:
    """A self-check as JSON values, with a checksum of them.

    Args:
        report: Any.
    """
    content = {
        "kind": KIND,
        "schema": SCHEMA,
        "started": report.started,
        "quick": report.quick,
        "budget": report.budget,
        "device": report.device,
        "facts": report.facts,
        "capabilities": [list(one) for one in report.capabilities],
        "gpu": None if report.gpu is None else asdict(report.gpu),
        "parts": [asdict(part) for part in report.parts],
        "checks": [asdict(check) for check in report.checks],
        "layouts": [asdict(layout) for layout in report.layouts],
        "layers": [{"problem": one.problem.to_record(), **one.measurement.to_record()} for one in report.layers],
        "choices": [
            {"key": key, "source": choice.source, "choice": choice.to_record()} for key, choice in report.choices
        ],
        "model": None if report.model is None else asdict(report.model),
    }
    return with_checksum(content)


def write(path: Path, report: Report) -> None:
    """Write a self-check; a reader sees the old file or the new one.

    Args:
        path: Of the file, in a folder that exists.
        report: Any.

    Raises:
        BenchError: It cannot be written.
    """
    text = json.dumps(document(report), indent=1, allow_nan=False) + "\n"
    try:
        write_atomically(path, text.encode())
    except OSError as error:
        raise BenchError(f"save={str(path)!r} cannot be written: {error.strerror or error}") from error


def read(path: Path) -> Report:
    """A self-check from a file.

    Args:
        path: Of the file.

    Raises:
        BenchError: There is no such file, or it is damaged, too large or of another version's format.
    """
    try:
        if path.exists() and not path.is_file():
            raise ValueError("it is not a regular file")  # reading a pipe would wait for ever
        if path.stat().st_size > LARGEST:
            raise ValueError(f"it has more than {LARGEST} bytes")
        return from_document(without_checksum(json.loads(path.read_bytes())))
    except OSError as error:
        raise BenchError(f"show={str(path)!r} cannot be read: {error.strerror or error}") from error
    except (AttributeError, KeyError, OverflowError, RecursionError, TypeError, ValueError) as error:
        raise BenchError(
            f"show={str(path)!r} is no self-check that can be used ({type(error).__name__}: {_short(error)}): make it "
            "anew with `semisparse bench`"
        ) from error


def from_document(content: Any) -> Report:
    """A self-check from JSON values.

    Args:
        content: As document() gives them.

    Raises:
        AttributeError, KeyError, OverflowError, TypeError, ValueError: They are damaged.
    """
    if content["kind"] != KIND or type(content["schema"]) is not int or content["schema"] != SCHEMA:
        raise ValueError(f"it is not a {KIND} file of schema {SCHEMA}")
    started = _text(content["started"])
    if not _STARTED.fullmatch(started):
        raise ValueError(f"started={started!r} is no time")
    return Report(
        started,
        _flag(content["quick"]),
        _number(content["budget"]),
        _among(content["device"], ("cuda", "cpu")),
        _texts(content["facts"]),
        [_capability(one) for one in _list(content["capabilities"])],
        None if content["gpu"] is None else _gpu(content["gpu"]),
        [_part(one) for one in _list(content["parts"])],
        [_check(one) for one in _list(content["checks"])],
        [_layout(one) for one in _list(content["layouts"])],
        [_layer(one) for one in _list(content["layers"])],
        [(_key(one["key"]), from_record(one["choice"], _among(one["source"], get_args(Source))))
         for one in _list(content["choices"])],
        None if content["model"] is None else _model(content["model"]),
    )  # fmt: skip


def _capability(record: Any) -> tuple[str, str, str]:
    name, path, reason = (_text(one) for one in _list(record))
    return name, path, reason


def _gpu(record: Mapping[str, Any]) -> Gpu:
    major, minor = (_whole(one) for one in _list(record["capability"]))
    limit = record["power_limit_watts"]
    return Gpu(_text(record["name"]), (major, minor), _whole(record["memory_bytes"]), _whole(record["processors"]),
               None if limit is None else _number(limit))  # fmt: skip


def _part(record: Mapping[str, Any]) -> Part:
    outcome = _among(record["outcome"], get_args(PartOutcome))
    return Part(_text(record["name"]), outcome, _number(record["seconds"]), _text(record["reason"]))


def _check(record: Mapping[str, Any]) -> Check:
    error, allowed = (None if record[name] is None else _number(record[name]) for name in ("error", "allowed"))
    texts = (_text(record[name]) for name in ("where", "rule", "reason"))
    found = Check(_text(record["name"]), _among(record["outcome"], get_args(Outcome)), error, allowed, *texts)
    if found.outcome == "pass" and (found.error is None or found.allowed is None or found.error > found.allowed):
        raise ValueError(f"{found.name!r} passes with an error of {found.error!r}, and {found.allowed!r} is allowed")
    return found


def _layout(record: Mapping[str, Any]) -> Layout:
    bits = tuple(_whole(bit) for bit in _list(record["bits"]))
    outcome = _among(record["outcome"], get_args(LayoutOutcome))
    return Layout(_text(record["dtype"]), outcome, _text(record["packer"]), bits, _text(record["reason"]))


def _layer(record: Mapping[str, Any]) -> LayerTimes:
    found = store.measurement({**record, "dropped": _texts(record["dropped"])})
    for name, times in found.times.items():
        _text(name)
        if not all((_number(times.ms), _number(times.on_device) >= 0, _number(times.on_host) >= 0)):
            raise ValueError(f"{name!r} takes no time")
    problem = problems.from_record(record["problem"])
    for size in (problem.tokens, problem.in_features, problem.out_features):
        _whole(size)
    return LayerTimes(problem, found)


def _model(record: Mapping[str, Any]) -> ModelTimes:
    ms = {_text(name): _number(value) for name, value in record["ms"].items()}
    if not all(value > 0 for value in ms.values()):
        raise ValueError(f"ms={ms} has a time that is none")
    mode = _among(record["mode"], ("compiled", "eager"))
    return ModelTimes(_text(record["title"]), mode, _text(record["why_eager"]), ms, _texts(record["dropped"]))


def _key(record: Any) -> dict[str, object]:
    """The key of a choice: texts, numbers and flags."""
    if not isinstance(record, dict) or len(record) > _LONGEST_LIST:
        raise ValueError("a choice has a key that is none")
    for name, value in record.items():
        _text(name)
        if isinstance(value, str):
            _text(value)
        elif value is not None and type(value) not in (int, float, bool):
            raise ValueError(f"the key of a choice has {name}={value!r}")
    return record


def _text(value: object) -> str:
    """A printable line: others could write to the terminal what they like."""
    if not isinstance(value, str) or len(value) > _LONGEST_TEXT or not value.isprintable():
        raise ValueError(f"{_short(value)} is no printable text")
    return value


def _texts(record: Mapping[str, Any]) -> dict[str, str]:
    if not isinstance(record, dict) or len(record) > _LONGEST_LIST:
        raise ValueError(f"{_short(record)} is no table of texts")
    return {_text(name): _text(value) for name, value in record.items()}


def _list(value: object) -> list[Any]:
    if not isinstance(value, list) or len(value) > _LONGEST_LIST:
        raise ValueError(f"{_short(value)} is no list of at most {_LONGEST_LIST}")
    return value


def _among(value: object, choices: tuple[str, ...]) -> Any:
    if value not in choices:
        raise ValueError(f"{_short(value)} is not one of {', '.join(choices)}")
    return value


def _flag(value: object) -> bool:
    if type(value) is not bool:
        raise ValueError(f"{_short(value)} is not true or false")
    return value


def _whole(value: object) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"{_short(value)} is no whole number")
    return value


def _number(value: object) -> float:
    if type(value) not in (int, float) or not 0 <= float(value) < math.inf:  # type: ignore[arg-type]
        raise ValueError(f"{_short(value)} is no number from 0 on")
    return float(value)  # type: ignore[arg-type]


def _short(value: object) -> str:
    """A value in a message: short and printable."""
    text = repr(value) if not isinstance(value, BaseException) else str(value)
    return "".join(letter if letter.isprintable() else "?" for letter in text[:100])
