"""Versions of packages and of the driver."""

import subprocess
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

from semisparse import versions
from semisparse.versions import driver_version, package_version

REPORT = """NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build  (dvs-builder@U22)
GCC version:  gcc version 13.3.0 (Ubuntu 13.3.0-6ubuntu2~24.04)
"""


@pytest.fixture
def report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The kernel module's report, not written yet, on a machine without nvidia-smi."""
    monkeypatch.setattr(versions, "_DRIVER_REPORT", tmp_path / "version")
    monkeypatch.setattr(versions.shutil, "which", lambda name: None)
    driver_version.cache_clear()
    yield tmp_path / "version"
    driver_version.cache_clear()


@pytest.mark.parametrize(
    ("text", "version"),
    [
        (REPORT, "580.95.05"),
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129  Thu\n", "535.129"),
        ("NVRM version: unreadable\nGCC version: 13.3.0\n", None),
        ("", None),
    ],
)
def test_the_drivers_version_is_the_one_of_the_first_line(report: Path, text: str, version: str | None) -> None:
    report.write_text(text)
    assert driver_version() == version


def test_without_a_report_nvidia_smi_is_asked(report: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(
        versions.subprocess, "run", lambda command, **options: SimpleNamespace(stdout="580.95.05\n580.95.05\n")
    )
    assert driver_version() == "580.95.05"


def test_an_nvidia_smi_that_fails_is_an_error(report: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object, **options: object) -> None:
        raise subprocess.TimeoutExpired("nvidia-smi", 20)

    monkeypatch.setattr(versions.shutil, "which", lambda name: name)
    monkeypatch.setattr(versions.subprocess, "run", broken)
    with pytest.raises(subprocess.TimeoutExpired):
        driver_version()


def test_without_a_driver_there_is_no_version(report: Path) -> None:
    assert driver_version() is None


def test_the_drivers_report_is_where_the_kernel_module_puts_it() -> None:
    assert str(versions._DRIVER_REPORT) == "/proc/driver/nvidia/version"


def test_a_package_that_is_not_installed_has_no_version() -> None:
    assert package_version("semisparse-no-such-package") is None
    assert package_version("torch") == metadata.version("torch")
