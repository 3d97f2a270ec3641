"""C source and documentation of the Linux kernel as text in three disjoint sets of files."""

import hashlib
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from semisparse_lab.checks import shown
from semisparse_lab.errors import DataError

PACKAGE = "linux-source-6.1"
"""The Debian package with the source, 139 MB."""
SUFFIXES = (".c", ".h", ".S", ".rst", ".txt")
GENERATED = ("drivers/gpu/drm/amd/include/", "fs/nls/")
"""Folders of registers and tables that a program wrote; so are all folders called asic_reg."""
HELD_OUT = 0.01
"""Share of the files that are for validation, and of those for test."""
END = "\0"
"""Ends each file in a set. Files that hold it are left out."""

PARTS = ("train", "validation", "test")
"""The sets."""

OnProgress = Callable[[str, int, int], None]
"""Told what is being done, how much of it is done, and how much there is."""


@dataclass(slots=True)
class Source:
    """Texts of a kernel, and what was counted while they were read.

    Attributes:
        texts: UTF-8 of the sets "train", "validation" and "test"; each file is followed by END.
        files: Number of files in each set.
        copies: Files left out because an earlier one has the same content.
        not_text: Files left out because they are not UTF-8 or hold END.
    """

    texts: dict[str, bytearray] = field(default_factory=lambda: {part: bytearray() for part in PARTS})
    files: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PARTS, 0))
    copies: int = 0
    not_text: int = 0


def part_of(path: str, share: float) -> str | None:
    """The set of a file, by a hash of its path; None for one that no set takes.

    Args:
        path: Below the source's folder.
        share: Of the files that are not held out, how many are for training.
    """
    place = int.from_bytes(hashlib.sha256(path.encode()).digest()[:8]) / 2**64
    if place < 2 * HELD_OUT:
        return "validation" if place < HELD_OUT else "test"
    return "train" if place < 2 * HELD_OUT + share * (1 - 2 * HELD_OUT) else None


def is_source(path: str) -> bool:
    """Whether the file at path below the source's folder is source or documentation that people wrote."""
    return path.endswith(SUFFIXES) and not path.startswith(GENERATED) and "/asic_reg/" not in path


def read_source(archive: Path, share: float, on_progress: OnProgress = lambda *_: None) -> Source:
    """Read the texts from an archive, in its order. Of files with equal contents only the first is kept.

    Args:
        archive: A .tar of any compression whose files lie in one folder, such as kernel.org's linux-6.1.tar.xz.
        share: As part_of's.
        on_progress: Told of the bytes of the archive that were read.

    Raises:
        DataError: The archive cannot be read, or a set has no file.
    """
    source, seen = Source(), set[bytes]()
    try:
        for path, content in _members(archive, on_progress):
            part = part_of(path, share)
            checksum = hashlib.sha256(content).digest()
            if checksum in seen:
                source.copies += 1
            elif not _is_text(content):
                source.not_text += 1
            elif part is not None:
                source.texts[part] += content + END.encode()
                source.files[part] += 1
            seen.add(checksum)
    except (OSError, EOFError, tarfile.TarError) as error:
        raise DataError(f"archive={shown(str(archive))} cannot be read: {error}; fetch it again") from error
    for part, count in source.files.items():
        if not count:
            raise DataError(f"archive={shown(str(archive))} has no file for {part}; pass the source of a whole kernel")
    return source


def fetched_archive(folder: Path) -> Path:
    """The archive from the Debian package, which is downloaded into folder where it is not there yet.

    Args:
        folder: For the package and its content; made where it is missing.

    Raises:
        DataError: apt-get or dpkg-deb is missing or fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not (package := _newest(folder, f"{PACKAGE}_*.deb")):
        _call(["apt-get", "download", PACKAGE], folder)
        package = _newest(folder, f"{PACKAGE}_*.deb")
    if package is None:
        raise DataError(f"apt-get download {PACKAGE} left no package in {folder}; pass archive=")
    return unpacked_package(package, folder)


def unpacked_package(package: Path, folder: Path) -> Path:
    """The archive inside a .deb, unpacked into folder.

    Args:
        package: The .deb.
        folder: Where its files go.

    Raises:
        DataError: dpkg-deb is missing or fails, or the package holds no archive.
    """
    _call(["dpkg-deb", "--extract", str(package.resolve()), "."], folder)
    if (archive := _newest(folder, "usr/src/linux-source-*.tar.*")) is None:
        raise DataError(f"archive={shown(str(package))} holds no usr/src/linux-source-*.tar.xz; pass another one")
    return archive


def _members(archive: Path, on_progress: OnProgress) -> Iterator[tuple[str, bytes]]:
    """Path and content of each file of source."""
    size = archive.stat().st_size
    with archive.open("rb") as raw, tarfile.open(fileobj=raw, mode="r|*") as tar:
        for member in tar:
            path = member.name.removeprefix("./").partition("/")[2]
            if member.isfile() and is_source(path) and (file := tar.extractfile(member)) is not None:
                yield path, file.read()
                on_progress("source files", raw.tell(), size)
    on_progress("source files", size, size)


def _is_text(content: bytes) -> bool:
    try:
        return END not in content.decode()
    except UnicodeDecodeError:
        return False


def _newest(folder: Path, pattern: str) -> Path | None:
    return max(folder.glob(pattern), key=lambda path: path.stat().st_mtime, default=None)


def _call(command: list[str], folder: Path) -> None:
    try:
        subprocess.run(command, cwd=folder, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise DataError(
            f"{' '.join(command)} failed ({error}); pass archive=, a linux-source-6.1.tar.xz or another kernel's source"
        ) from error
