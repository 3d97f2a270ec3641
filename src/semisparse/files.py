"""Writing files so that a reader sees the old file or the new one, even if the process is killed while writing."""

import contextlib
import errno
import hashlib
import os
import re
import secrets
import stat
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, which deletes no file that is open: a lock of another kind
    fcntl = None  # type: ignore[assignment]

_PREFIX = ".semisparse-"
_SUFFIX = ".tmp"
_NO_FOLLOWING = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


def write_atomically(path: Path, content: bytes, mode: int = 0o666) -> None:
    """Write content to a new file in path's folder, then rename it to path; both are on the disk when this returns.

    The new file's name is random, and it is never opened through a link. If path is a link, the link is replaced and
    its target stays as it was. Temporary files that killed processes left for the same path are removed; those of
    processes that still write are locked and stay.

    Args:
        path: The file to write.
        content: All of its bytes.
        mode: Permissions of the new file, less those that the umask takes away.

    Raises:
        OSError: path is then as it was, unless only the folder could not be synced.
    """
    _sweep(path)
    descriptor, temporary = _create(path, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            if fcntl is not None:
                os.replace(temporary, path)  # under the lock, so that no other process removes it as an orphan
        if fcntl is None:
            os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _create(path: Path, mode: int = 0o666) -> tuple[int, Path]:
    """A new file for path's content, locked, and its name."""
    while True:
        temporary = path.with_name(f"{_stem(path)}{secrets.token_hex(8)}{_SUFFIX}")
        # O_EXCL fails on anything of that name, a dangling link too.
        descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY | _NO_FOLLOWING, mode)
        if fcntl is None:
            return descriptor, temporary
        with contextlib.suppress(OSError):  # a file system without locks; a sweep can take none there either
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:
            return descriptor, temporary
        os.close(descriptor)  # another process swept it before it was locked


def _sweep(path: Path) -> None:
    """Remove temporary files that killed processes left for path. Never raises: an orphan only costs space."""
    ours = re.compile(re.escape(_stem(path)) + r"[0-9a-f]{16}" + re.escape(_SUFFIX))
    with contextlib.suppress(OSError):
        for name in os.listdir(path.parent):
            if ours.fullmatch(name):
                with contextlib.suppress(OSError):
                    _remove_unless_locked(path.with_name(name))


def _remove_unless_locked(orphan: Path) -> None:
    if not stat.S_ISREG(orphan.lstat().st_mode):
        return
    if fcntl is None:
        orphan.unlink()
        return
    descriptor = os.open(orphan, os.O_RDONLY | _NO_FOLLOWING)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel frees a lock when its process dies
        orphan.unlink()
    finally:
        os.close(descriptor)


def _stem(path: Path) -> str:
    """How temporary names for path begin: of one length, so that no final name is too long for one."""
    return f"{_PREFIX}{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]}-"


def _sync_folder(folder: Path) -> None:
    """Put the folder's new entry on the disk, where the system can: a rename is not there before."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that sync no folders
            raise
    finally:
        os.close(descriptor)
