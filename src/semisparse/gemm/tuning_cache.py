"""Tuning results on disk: one small JSON file a problem under the user's cache folder.

The file's name is a digest of the whole key (GPU, driver, versions, dtype, layout, shape bucket), and the key stands
inside it again, so another machine's or another version's results are never found, nor believed if they were. Files
are written aside and renamed, so any number of processes may write at once: a reader sees one complete file or none.

A file is trusted only if this user alone could have written it. Anything else is ignored, with one warning a process,
and the problem is tuned again. No value from a file reaches a path or source text.
"""

import hashlib
import json
import os
import stat
import tempfile
import time
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from semisparse.gemm.choice import Choice, from_record

SCHEMA = 1
"""Version of the file format; files of another one are ignored."""

LARGEST_FILE = 64 * 1024
"""Bytes. A real file has about two thousand."""

_OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH
_ABANDONED_S = 3600.0


def canonical(key: Mapping[str, object]) -> str:
    """A key (JSON values only) as one line of text, equal for equal keys."""
    return json.dumps(key, sort_keys=True, separators=(",", ":"), allow_nan=False)


def default_folder() -> Path:
    """$XDG_CACHE_HOME/semisparse, or ~/.cache/semisparse where that is unset or not absolute. Read on each call."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "semisparse"


class TuningCache:
    """Choices by key, in a folder (default: default_folder() at each use). Neither method ever raises."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._warned = False
        self._swept = False

    def load(self, key: Mapping[str, object]) -> Choice | None:
        """The stored choice for exactly this key, or None."""
        path: Path | None = None
        try:
            path = self._path(key)
            if not _trusted_folder(path.parent):
                return None
            text = _read_trusted(path)
            return None if text is None else _parse(text, key)
        except (OSError, ValueError, RecursionError, RuntimeError) as error:
            self._warn("read", path, error)
            return None

    def store(self, key: Mapping[str, object], choice: Choice) -> None:
        """Write a choice, replacing an older one; where that cannot be done it is only warned of."""
        path: Path | None = None
        try:
            path = self._path(key)
            path.parent.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with suppress(FileExistsError):
                path.parent.mkdir(mode=0o700)
            _trusted_folder(path.parent)
            self._sweep(path.parent)
            record = {"schema": SCHEMA, "key": dict(key), "choice": choice.to_record()}
            _replace(path, json.dumps(record, indent=1, sort_keys=True, allow_nan=False))
        except (OSError, ValueError, RuntimeError) as error:
            self._warn("write", path, error)

    def _path(self, key: Mapping[str, object]) -> Path:
        digest = hashlib.sha256(canonical(key).encode()).hexdigest()
        return (self._folder or default_folder()) / f"{digest}.json"

    def _sweep(self, folder: Path) -> None:
        """Remove what killed writers left behind, once a process."""
        if self._swept:
            return
        self._swept = True
        for path in folder.glob("*.tmp"):
            with suppress(OSError):
                if time.time() - path.lstat().st_mtime > _ABANDONED_S:
                    path.unlink()

    def _warn(self, action: str, path: Path | None, error: Exception) -> None:
        if self._warned:
            return
        self._warned = True
        warnings.warn(
            f"could not {action} the tuning cache {path or ''}: {error}. Problems are tuned anew in every process; "
            "remove the file or folder to repair it (this is said once)",
            RuntimeWarning,
            stacklevel=3,
        )


def _trusted_folder(folder: Path) -> bool:
    """False where there is no folder; raises OSError where someone else could have put files into it."""
    try:
        status = folder.lstat()
    except FileNotFoundError:
        return False
    if not stat.S_ISDIR(status.st_mode):
        raise OSError("the folder is a link or a file")
    _check_owner(status, "the folder")
    return True


def _read_trusted(path: Path) -> str | None:
    """Text of a file that only this user can have written; None where there is none. Raises OSError, ValueError."""
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
    try:
        descriptor = os.open(path, flags)
    except FileNotFoundError:
        return None
    with open(descriptor, "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError("the file is no regular file")
        _check_owner(status, "the file")
        content = file.read(LARGEST_FILE + 1)
    if len(content) > LARGEST_FILE:
        raise ValueError(f"the file has more than {LARGEST_FILE} bytes")
    return content.decode("utf-8")


def _check_owner(status: os.stat_result, what: str) -> None:
    if hasattr(os, "geteuid") and status.st_uid != os.geteuid():
        raise OSError(f"{what} belongs to user {status.st_uid}, not to this process's user {os.geteuid()}")
    if os.name == "posix" and status.st_mode & _OTHERS_MAY_WRITE:
        raise OSError(f"{what} can be written by other users (mode {stat.S_IMODE(status.st_mode):o})")


def _parse(text: str, key: Mapping[str, object]) -> Choice:
    record = json.loads(text)
    if not isinstance(record, dict) or set(record) != {"schema", "key", "choice"}:
        raise ValueError("the file must have exactly the fields schema, key, choice")
    if record["schema"] != SCHEMA or type(record["schema"]) is not int:
        raise ValueError(f"the file has schema {record['schema']!r}, this version reads {SCHEMA}")
    if not isinstance(record["key"], dict) or canonical(record["key"]) != canonical(key):
        raise ValueError("the file holds another key than its name says")
    return from_record(record["choice"], "disk")


def _replace(path: Path, text: str) -> None:
    descriptor, aside = tempfile.mkstemp(suffix=".tmp", dir=path.parent)  # mode 0600
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(aside, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(aside)
        raise
