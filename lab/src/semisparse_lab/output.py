"""The output folder of a command, checked before any training."""

import contextlib
import errno
import os
import stat
import tempfile
from collections.abc import Iterable
from pathlib import Path

from semisparse.errors import ConfigError
from semisparse_lab.checks import shown
from semisparse_lab.errors import OutputExistsError


def prepare_output(folder: Path, files: Iterable[str], *, force: bool) -> None:
    """Create folder, or check that it may be written to. Call it after all other checks and before training.

    Deletes nothing, also not with force: each old file is replaced when its new content is there.

    Args:
        folder: The output folder.
        files: Names of the files that will be written there.
        force: Take a folder that holds something.

    Raises:
        OutputExistsError: folder holds anything and force is not set, or it is not a folder at all.
        ConfigError: folder cannot be created or written, or holds something under one of files that no file can
            replace.
    """
    try:
        if folder.is_symlink() and not folder.exists():
            raise OutputExistsError(f"out={shown(str(folder))} is a link to nothing; choose another name")
        if folder.exists() and not folder.is_dir():
            raise OutputExistsError(f"out={shown(str(folder))} is a file, not a folder; choose another name")
        if folder.is_dir() and any(folder.iterdir()) and not force:
            raise OutputExistsError(
                f"out={shown(str(folder))} is not empty; choose another folder or overwrite it with --force"
            )
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, "no permission to write there")
        for name in files:
            _check_replaceable(folder / name)
        tempfile.TemporaryFile(dir=folder).close()  # what access does not know of: quotas, disks that are full
    except OSError as error:
        raise ConfigError(f"out={shown(str(folder))} cannot be written: {error.strerror or error}") from error


def _check_replaceable(path: Path) -> None:
    """Raise OSError if path exists and write_atomically cannot replace it: a folder, a device, a pipe."""
    with contextlib.suppress(FileNotFoundError):
        mode = path.lstat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
            raise OSError(errno.EEXIST, f"{path.name} is there and not a file")
