"""Whether the native library is in use, and why not."""

from pathlib import Path

import pytest

from semisparse import native
from semisparse.native import loading


def asked_anew() -> native.Status:
    """Not the answer that this process has given before."""
    found, reason = loading._load.__wrapped__()
    return native.Status(found is not None, reason)


def test_zero_switches_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEMISPARSE_NATIVE", "0")
    assert asked_anew() == native.Status(False, "switched off by SEMISPARSE_NATIVE=0")


def test_a_library_that_was_not_built_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SEMISPARSE_NATIVE", raising=False)
    monkeypatch.setattr(loading, "LIBRARY", tmp_path / "launch.so")
    assert asked_anew() == native.Status(False, "not built: launch.so is not there")


def test_a_library_that_does_not_load_is_told_with_the_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SEMISPARSE_NATIVE", raising=False)
    broken = tmp_path / "launch.so"
    broken.write_text("not a library")
    monkeypatch.setattr(loading, "LIBRARY", broken)
    found = asked_anew()
    assert not found.loaded
    assert found.reason.startswith("cannot be loaded: OSError: ")
    assert "launch.so" in found.reason
