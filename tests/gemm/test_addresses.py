"""Addresses of a library's functions are told where they are certain; else all are 0."""

import sys
from pathlib import Path
from types import ModuleType

import pytest

from semisparse.gemm import addresses as module
from semisparse.gemm.addresses import _in_memory, addresses

BINDINGS = "nvmath.bindings._internal.cusparseLt"
NAMES = ("cusparseLtMatmul", "cusparseLtMatmulDescSetAttribute")
LINE = "7f00-7f01 r-xp 00000000 08:01 42                         {path}\n"


def maps(tmp_path: Path, *paths: str) -> Path:
    file = tmp_path / "maps"
    anonymous = "7f00-7f01 rw-p 00000000 00:00 0\n"
    file.write_text(anonymous + "".join(LINE.format(path=path) for path in paths) + anonymous)
    return file


def bindings(monkeypatch: pytest.MonkeyPatch, **functions: int) -> None:
    made = ModuleType(BINDINGS)
    made._inspect_function_pointer = lambda name: functions[name]
    monkeypatch.setitem(sys.modules, BINDINGS, made)


def test_those_of_the_bindings_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    bindings(monkeypatch, **{f"__{name}": 100 + n for n, name in enumerate(NAMES)})
    assert addresses(*NAMES) == (100, 101)


def test_one_that_is_missing_makes_all_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    bindings(monkeypatch, **{f"__{NAMES[0]}": 100, f"__{NAMES[1]}": 0})
    assert addresses(*NAMES) == (0, 0)


def test_bindings_that_tell_nothing_leave_the_library_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    bindings(monkeypatch)
    monkeypatch.setattr(module, "_in_memory", lambda names: (7,) * len(names))
    assert addresses(*NAMES) == (7, 7)


@pytest.mark.parametrize(
    "paths",
    [(), ("/a/libcusparseLt.so.0", "/b/libcusparseLt.so.0"), ("/a/libcusparseLt.so.0 (deleted)",),
     ("/nowhere/libcusparseLt.so.0",)],
    ids=["none", "two", "deleted", "not loaded"],
)  # fmt: skip
def test_without_one_library_that_is_loaded_all_are_zero(tmp_path: Path, paths: tuple[str, ...]) -> None:
    assert _in_memory(NAMES, maps(tmp_path, *paths, *paths)) == (0, 0)


def test_a_library_without_the_functions_gives_zeros(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.ctypes, "CDLL", lambda path, mode: object())
    assert _in_memory(NAMES, maps(tmp_path, "/a/libcusparseLt.so.0")) == (0, 0)


def test_without_a_list_of_what_is_mapped_all_are_zero(tmp_path: Path) -> None:
    assert _in_memory(NAMES, tmp_path / "nothing") == (0, 0)
