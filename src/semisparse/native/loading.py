"""Whether the native library is used, and why; decided once, when the ops are registered."""

import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from semisparse.native.interface import Interface

VARIABLE = "SEMISPARSE_NATIVE"
"""Environment variable: 0 leaves the library unused."""

LIBRARY = Path(__file__).with_name("launch.so")


@dataclass(frozen=True, slots=True)
class Status:
    """Whether hot ops on CUDA are started by C++.

    Attributes:
        loaded: Whether they are.
        reason: Why, or why not.
    """

    loaded: bool
    reason: str


@cache
def _load() -> tuple[Interface | None, str]:
    if os.environ.get(VARIABLE, "1") == "0":
        return None, f"switched off by {VARIABLE}=0"
    if not LIBRARY.is_file():
        return None, f"not built: {LIBRARY.name} is not there"
    try:
        return Interface(LIBRARY), f"{LIBRARY.name} is loaded"
    except Exception as error:  # a library that does not fit this torch can fail in any way
        return None, f"cannot be loaded: {type(error).__name__}: {error}"


def library() -> Interface | None:
    """The library, loaded at the first call; None where it cannot be used."""
    return _load()[0]


def status() -> Status:
    """Whether the library is used in this process, and the reason. Never raises."""
    found, reason = _load()
    return Status(found is not None, reason)


@cache
def registered() -> bool:
    """Make C++ implement the hot ops on CUDA, if the library is there; whether it does."""
    found = library()
    if found is None:
        return False
    found.register()
    return True
