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
        if not _is_whole(LIBRARY):
            return None, f"cannot be loaded: {LIBRARY.name} is cut off; build or install it again"
        return Interface(LIBRARY), f"{LIBRARY.name} is loaded"
    except Exception as error:  # a library that does not fit this torch can fail in any way
        return None, f"cannot be loaded: {type(error).__name__}: {error}"


def _is_whole(path: Path) -> bool:
    """Whether a file of the format ELF, 64 bits, little-endian, ends where its table of sections does, or later.

    The system maps a file that is cut off, and the process ends with SIGBUS where it reads beyond.
    """
    with path.open("rb") as file:
        head = file.read(64)
    if head[:6] != b"\x7fELF\x02\x01" or len(head) < 64:
        return True  # which the system refuses, or it is another format
    table, size, count = (
        int.from_bytes(head[40:48], "little"),
        *(int.from_bytes(head[at : at + 2], "little") for at in (58, 60)),
    )
    return path.stat().st_size >= table + size * count


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
