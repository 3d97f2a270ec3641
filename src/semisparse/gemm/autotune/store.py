"""Choices as JSON: on disk for later processes, for other ranks, and as a table that ships with the package.

All three are one document, {"schema": 1, "choices": [{"key": ..., "choice": ...}, ...]}, with one reader. A key holds
all that a choice depends on (GPU, driver, versions, dtype, storage orders, sizes; Autotuner.key). A document may be
damaged or foreign: from_document() then raises ValueError, and no algorithm runs that the library does not offer.

Only files and folders of this user that nobody else can write to are read: choices of others are not followed.

On disk each problem has a small file of its own, named by a digest of its key. The file also contains the full key, so
a result of another machine or version is never used, even after a hash collision. Its checksum shows a flipped digit.
Files are written aside and renamed: any number of processes may write at once, and a reader sees a whole file or none.
"""

import hashlib
import json
import logging
import math
import os
import stat
import warnings
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from semisparse.documents import with_checksum, without_checksum
from semisparse.files import write_atomically
from semisparse.gemm.autotune.algorithm import Choice, Source, from_record

logger = logging.getLogger(__name__)

SCHEMA = 1
"""Version of the document; others are not read."""

LARGEST = 2**20
"""Bytes of a file that is read; a whole one has about a thousand."""

Key = dict[str, object]
Entry = tuple[Key, Choice]


def canonical(key: Mapping[str, object]) -> str:
    """A key (JSON values only) as one line of text, equal for equal keys."""
    return json.dumps(key, sort_keys=True, separators=(",", ":"), allow_nan=False)


def to_document(entries: Iterable[Entry]) -> dict[str, Any]:
    """Choices with their keys as one document of JSON values."""
    return {"schema": SCHEMA, "choices": [{"key": key, "choice": choice.to_record()} for key, choice in entries]}


def from_document(content: Any, source: Source) -> list[Entry]:
    """The entries of a document that may be damaged or foreign.

    Args:
        content: JSON values.
        source: Where they come from.

    Raises:
        ValueError: Something of it cannot be used; nothing is then taken from it.
    """
    try:
        if type(content["schema"]) is not int or content["schema"] != SCHEMA:
            raise ValueError(f"schema {content['schema']!r}, this version reads {SCHEMA}")
        entries = [(dict(entry["key"]), from_record(entry["choice"], source)) for entry in content["choices"]]
        for key, _ in entries:
            canonical(key)
    except (AttributeError, KeyError, OverflowError, RecursionError, TypeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    return entries


def default_folder() -> Path:
    """$XDG_CACHE_HOME/semisparse, or ~/.cache/semisparse where that is unset or not absolute. Read on each call."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "semisparse"


class Store:
    """Choices in a folder (default: default_folder() at each use). No method raises.

    A file that cannot be used is ignored and logged; the problem is then tuned again and the file replaced.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._warned = False

    def load(self, key: Key) -> Choice | None:
        """The stored choice for exactly this key, or None."""
        path = None
        try:
            path = self._path(key)
            ((found, choice),) = from_document(without_checksum(json.loads(read_own(path))), "disk")
            if canonical(found) != canonical(key):
                raise ValueError("the file holds another key than its name says")
            return choice
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError, RuntimeError) as error:
            logger.warning("ignored the stored tuning result %s: %s", path, error)
            return None

    def save(self, key: Key, choice: Choice) -> None:
        """Write a choice in place of an older one. Warns, once, where that is not possible."""
        try:
            path = self._path(key)
            make_own_folder(path.parent)
            text = json.dumps(with_checksum(to_document([(key, choice)])), indent=1, allow_nan=False)
            write_atomically(path, text.encode(), mode=0o600)  # read_own reads no file that others may write to
            logger.debug("wrote %s", path)
        except (OSError, ValueError, RuntimeError) as error:
            logger.info("could not store a tuning result: %s", error)
            if not self._warned:
                self._warned = True
                warnings.warn(
                    f"tuning results cannot be stored ({error}); every process will tune again. Make "
                    "$XDG_CACHE_HOME/semisparse or ~/.cache/semisparse writable",
                    RuntimeWarning,
                    stacklevel=3,
                )

    def _path(self, key: Key) -> Path:
        digest = hashlib.sha256(canonical(key).encode()).hexdigest()
        return (self._folder or default_folder()) / f"{digest}.json"


def read_own(path: Path) -> bytes:
    """The content of a file that this user alone can have written, in a folder of which that holds, too.

    Args:
        path: Of the file; a symbolic link is not followed.

    Raises:
        OSError: There is no such file, it is a link, a pipe or too large, or others own it or may write to it.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise OSError("it is not a regular file")  # reading a pipe would wait for ever
        for name, state in (("it", found), ("its folder", path.parent.stat())):
            if state.st_uid != os.geteuid():
                raise PermissionError(f"{name} belongs to another user (id {state.st_uid})")
            if state.st_mode & _OTHERS_WRITE:
                raise PermissionError(f"others may write to {name}: chmod go-w")
        if found.st_size > LARGEST:
            raise OSError(f"it has more than {LARGEST} bytes")
        return file.read(LARGEST)


_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def make_own_folder(folder: Path) -> None:
    """Make a folder, or take the right to write into it away from others if it is this user's.

    Args:
        folder: Of files for read_own.

    Raises:
        OSError: It cannot be made.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    mode = folder.stat()
    if mode.st_mode & _OTHERS_WRITE and mode.st_uid == os.geteuid():
        folder.chmod(stat.S_IMODE(mode.st_mode) & ~_OTHERS_WRITE)


@cache
def shipped() -> tuple[Entry, ...]:
    """The choices that ship with the package, read once.

    shipped.json is made from benchmark results by benchmarks/shipped_table.py. Its keys name the GPU and the library's
    version (ids change between versions), not driver or torch.
    """
    text = resources.files(__package__).joinpath("shipped.json").read_text(encoding="utf-8")
    return tuple(from_document(json.loads(text), "shipped"))


def find_shipped(entries: Iterable[Entry], key: Mapping[str, object]) -> Choice | None:
    """The first choice whose conditions a tuning key fulfils, its tokens in the same bucket, or None."""
    return next((choice for conditions, choice in entries if _agrees(conditions, key, "")), None)


def find_near(entries: Iterable[Entry], key: Mapping[str, object]) -> Choice | None:
    """As find_shipped, but with the nearest token count, from half to twice as many."""
    axis = str(key["token_axis"])
    distances = [(_distance(conditions[axis], key[axis]), choice) for conditions, choice in entries
                 if _agrees(conditions, key, axis)]  # fmt: skip
    distance, choice = min(distances, key=lambda pair: pair[0], default=(math.inf, None))
    return choice if distance <= 2 else None


def _agrees(conditions: Mapping[str, object], key: Mapping[str, object], but: str) -> bool:
    return all(key.get(name) == value for name, value in conditions.items() if name != but)


def _distance(tokens: object, others: object) -> float:
    """By what factor the larger number is larger."""
    if not (isinstance(tokens, int) and isinstance(others, int)):
        return math.inf
    return max(tokens, others) / min(tokens, others)
