"""Reading the result files of experiments, which may have been edited by hand, so that every value is checked."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from semisparse_lab.checks import is_number, shown
from semisparse_lab.errors import DataError
from semisparse_lab.report.run_document import KIND
from semisparse_lab.strict_json import read

Result = dict[str, Any]
_Check = Callable[[Any], bool]

_FILE_NAME = re.compile(r"\w[\w.-]{0,99}", re.ASCII)


def load_results(folder: Path) -> list[Result]:
    """Read the results of experiments in a folder.

    Args:
        folder: The folder; files of other kinds in it are ignored.

    Returns:
        The results, in the order of their file names.

    Raises:
        DataError: A file is damaged, or results of one experiment have different settings or numbers of epochs.
    """
    found: list[Result] = []
    first: dict[str, Result] = {}
    for path in sorted(folder.glob("*.seed*.json")):
        try:
            content = read(path)
        except (OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read as a result: {error}") from error
        if isinstance(content, dict) and content.get("kind") == KIND:
            _check(path, content, "", _RESULT)
            other = first.setdefault(content["experiment"], content)
            if other["settings"] != content["settings"]:
                raise DataError(f"{path} has other settings than its neighbours; keep them in different folders")
            if len(other["run"]["epochs"]) != len(content["run"]["epochs"]):
                raise DataError(f"{path} has another number of epochs than its neighbours; train it again")
            found.append(content)
    return found


def _check(path: Path, values: dict[str, Any], where: str, checks: dict[str, Any]) -> None:
    """Raise DataError unless values hold all in checks: a test, a dict of checks, or a list of one for such dicts."""
    for name, check in checks.items():
        place = f"{where}{name}"
        if name not in values:
            raise DataError(f"{path} is not a whole result: it has no {place!r}; train it again")
        if isinstance(check, dict):
            _check(path, _a_dict(path, place, values[name]), f"{place}.", check)
        elif isinstance(check, list):
            if not isinstance(values[name], list):
                raise _wrong(path, place, values[name])
            for item in values[name]:
                _check(path, {**_OPTIONAL, **_a_dict(path, place, item)}, f"{place}.", check[0])
        elif not check(values[name]):
            raise _wrong(path, place, values[name])


def _a_dict(path: Path, place: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _wrong(path, place, value)
    return value


def _wrong(path: Path, place: str, value: Any) -> DataError:
    return DataError(f"{path} is not a result: {place!r} cannot be {shown(value)}; train it again")


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 64


def _number(value: Any) -> bool:
    return value is None or is_number(value)


def _file_name(value: Any) -> bool:
    """A card has the name of its experiment, so that name must not lead into another folder."""
    return isinstance(value, str) and _FILE_NAME.fullmatch(value) is not None


def _more(value: Any) -> bool:
    return isinstance(value, dict) and all(item is None or isinstance(item, str) or is_number(item)
                                           or isinstance(item, bool) for item in value.values())  # fmt: skip


_PHASE: dict[str, _Check] = {"kind": _text, "seconds_per_step": _number, "sparse_products": _count}
_EPOCH: dict[str, Any] = {"step": _count, "train_loss": _number, "flip_rate": _number, "kept_magnitude": _number,
                          "validation": {"loss": _number, "accuracy": _number}}  # fmt: skip
_OPTIONAL = {"kept_magnitude": None}
"""Fields that older results lack."""
_RESULT: dict[str, Any] = {
    "experiment": _file_name, "row": _text, "row_title": _text, "order": _count, "seed": _count, "value": _number,
    "more": _more, "run": {"phases": [_PHASE], "epochs": [_EPOCH]}, "settings": lambda value: True, "gpu": _text,
    "commit": lambda value: value is None or isinstance(value, str),
    "environment": {"torch": _text, "triton": _text, "cuSPARSELt": _text}, "title": _text, "metric": _text,
    "higher_is_better": lambda value: isinstance(value, bool), "command": _text,
}  # fmt: skip
"""What each value of a result must be."""
