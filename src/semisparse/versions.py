"""Versions of this package, of other packages and of the NVIDIA driver, each found in one way."""

import re
import shutil
import subprocess
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path

__version__ = "0.1.0"
"""Of this package; pyproject.toml reads it here."""

_DRIVER_REPORT = Path("/proc/driver/nvidia/version")


@cache
def package_version(name: str) -> str | None:
    """Version of an installed package, without importing it; None where it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


@cache
def driver_version() -> str | None:
    """The NVIDIA driver's version, from the kernel module's report or else from nvidia-smi; None without a driver.

    Raises:
        OSError, subprocess.SubprocessError: nvidia-smi is there and fails.
    """
    with suppress(OSError):
        first = _DRIVER_REPORT.read_text(encoding="utf-8", errors="replace").partition("\n")[0]
        if found := re.search(r"\b\d+\.\d+(\.\d+)?\b", first):
            return found.group()
    command = shutil.which("nvidia-smi")  # WSL has no report
    if command is None:
        return None
    query = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    return ", ".join(sorted(set(answer.stdout.split()))) or None
