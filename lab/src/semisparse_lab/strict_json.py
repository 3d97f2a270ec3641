"""Reading JSON that others wrote: all that can be wrong with the text is one ValueError."""

import json
from pathlib import Path
from typing import Any


def parse(text: str | bytes) -> Any:
    """The value that text stands for. Raises ValueError for anything that is not plain, finite JSON.

    So it does for names given twice, NaN and infinities, numbers too large for a float or with thousands of digits,
    other encodings than UTF-8, and brackets nested deeper than Python can follow.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode()
        return json.loads(text, object_pairs_hook=_once, parse_constant=_refuse, parse_float=_finite)
    except RecursionError:
        raise ValueError("brackets are nested too deeply") from None


def read(path: Path) -> Any:
    """What parse makes of a file. Raises OSError and ValueError."""
    return parse(path.read_bytes())


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name is given twice")
    return found


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a JSON number")


def _finite(digits: str) -> float:
    value = float(digits)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"{digits[:20]} is too large a number")
    return value
