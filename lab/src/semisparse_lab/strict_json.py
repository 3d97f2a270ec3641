"""Reading JSON from files that may be damaged: whatever is wrong with the text is a ValueError."""

import json
from pathlib import Path
from typing import Any

from semisparse.documents import without_checksum


def parse(text: str | bytes) -> Any:
    """The value of a JSON text.

    Args:
        text: JSON; bytes are UTF-8.

    Raises:
        ValueError: text is not plain, finite JSON. Names given twice, NaN and infinities, numbers too large for a float
            or with thousands of digits, other encodings and brackets that are nested too deeply are errors, too.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode()
        return json.loads(text, object_pairs_hook=_once, parse_constant=_refuse, parse_float=_finite)
    except RecursionError:
        raise ValueError("brackets are nested too deeply") from None


def read(path: Path) -> Any:
    """The value of a JSON file, without the checksum that it may hold of itself.

    Args:
        path: The file.

    Raises:
        OSError: It cannot be read.
        ValueError: As parse, or the checksum is that of other contents.
    """
    return without_checksum(parse(path.read_bytes()))


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
