"""JSON documents that hold a checksum of themselves, so that a changed digit is seen and not taken for a value."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

CHECKSUM = "sha256"
"""The name of the checksum in a document."""


def with_checksum(document: Mapping[str, Any]) -> dict[str, Any]:
    """A document with its checksum as the last field.

    Args:
        document: JSON values, all numbers finite.

    Raises:
        ValueError: A number is not finite.
    """
    return {**document, CHECKSUM: _checksum(document)}


def without_checksum(document: Any) -> Any:
    """A document as it was before with_checksum. The order of its fields and the space between them do not count.

    Args:
        document: JSON values. One without a checksum is returned as it is: earlier versions wrote none, and who edits a
            file by hand leaves it out.

    Raises:
        ValueError: The document is not the one that its checksum was made of.
    """
    if not isinstance(document, dict) or CHECKSUM not in document:
        return document
    rest = {name: value for name, value in document.items() if name != CHECKSUM}
    try:
        found = _checksum(rest)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if found != document[CHECKSUM]:
        raise ValueError(
            f"it was damaged or edited: its {CHECKSUM!r} is that of other contents; after an edit on purpose, remove "
            "that field"
        )
    return rest


def _checksum(document: Mapping[str, Any]) -> str:
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
