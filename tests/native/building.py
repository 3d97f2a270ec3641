"""Builds what the tests of the native library run, once, however many test processes ask for it."""

import fcntl
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest

from csrc import build
from tests.arch.source import ROOT

SOURCES = ROOT / "csrc" / "tests"
SANITIZED = ("-g", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all")


def folder() -> Path:
    """Kept between runs, since building takes longer than most tests; one for each checkout."""
    owner = hashlib.sha256(f"{os.getuid()} {ROOT}".encode()).hexdigest()[:16]
    made = Path(tempfile.gettempdir()) / f"semisparse-native-{owner}"
    made.mkdir(exist_ok=True)
    return made


@contextmanager
def locked(name: str) -> Iterator[Path]:
    """The path of a built file, while no other test process builds it."""
    path = folder() / name
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield path


def sanitized(*names: str) -> tuple[str, ...]:
    """Flags of sanitizers; skips the test where the compiler lacks one of them."""
    for name in names:
        if reason := _missing(name):
            pytest.skip(reason)
    return (f"-fsanitize={','.join(names)}", *SANITIZED)


@cache
def _missing(name: str) -> str | None:
    with tempfile.TemporaryDirectory() as scratch:
        command = [*compiler(), f"-fsanitize={name}", "-x", "c++", "-", "-o", str(Path(scratch) / "a")]
        done = subprocess.run(command, input="int main() {}", capture_output=True, text=True, check=False)
        if done.returncode:
            return f"{command[0]} cannot build with the {name} sanitizer: {done.stderr.strip()[-200:]}"
        done = subprocess.run([command[-1]], capture_output=True, text=True, check=False)
    return f"the {name} sanitizer does not run here: {done.stderr.strip()[-200:]}" if done.returncode else None


def compiler() -> list[str]:
    """The command of the C++ compiler; skips the test where there is none."""
    try:
        return build.compiler()
    except build.Unavailable as missing:
        pytest.skip(str(missing))


def cpu_library(flags: Sequence[str] = ("-O0",)) -> Path:
    """csrc/tests/library.cpp, built; skips the test where it cannot be."""
    compiler()
    with locked(f"{'-'.join(['library', *(flag.strip('-').replace('=', '-') for flag in flags)])}.so") as path:
        build.build(path, [SOURCES / "library.cpp"], flags)
    return path


def program(source: str, flags: Sequence[str]) -> Path:
    """A program of csrc/tests, built."""
    command = [*compiler(), "-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", "-pthread", *flags]
    read = (SOURCES / source, *sorted((ROOT / "csrc").glob("*.h")))
    digest = hashlib.sha256(b"\0".join([repr(command).encode(), *(path.read_bytes() for path in read)])).hexdigest()
    with locked(f"{Path(source).stem}{''.join(flags[:1])}") as path:
        built_from = path.with_suffix(".digest")
        if not (path.exists() and built_from.exists() and built_from.read_text() == digest):
            subprocess.run([*command, str(SOURCES / source), "-o", str(path)], check=True)
            built_from.write_text(digest)
    return path
