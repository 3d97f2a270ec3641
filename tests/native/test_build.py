"""csrc/build.py: what it builds, when it builds again, and what it says where it can't."""

import importlib.util
import sys
import tomllib
from pathlib import Path

import pytest

from csrc import build
from tests.arch.source import ROOT

try:
    build.compiler()
except build.Unavailable as missing:
    pytest.skip(str(missing), allow_module_level=True)

SOURCE = '#include "number.h"\nextern "C" __attribute__((visibility("default"))) int number() { return NUMBER; }\n'


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "number.h").write_text("#define NUMBER 1\n")
    file = tmp_path / "number.cpp"
    file.write_text(SOURCE)
    return file


@pytest.fixture
def made(tmp_path: Path) -> Path:
    return tmp_path / "number.so"


def test_the_sources_compile_with_the_headers_of_this_torch(tmp_path: Path) -> None:
    output = tmp_path / "launch.so"
    line = build.build(output, flags=["-O0"])
    assert line.startswith("native: built launch.so (")
    assert line.endswith("for torch >= 2.11")
    assert output.read_bytes().startswith(b"\x7fELF")
    assert list(tmp_path.iterdir()) == [output]


def test_it_targets_the_oldest_torch_that_the_package_accepts() -> None:
    accepted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert "torch>=" + ".".join(map(str, build.OLDEST_TORCH)) in accepted
    assert build.TARGET == "-DTORCH_TARGET_VERSION=0x020b000000000000"


def test_nothing_is_built_again_until_a_source_a_header_or_a_flag_changes(source: Path, made: Path) -> None:
    assert "built" in build.build(made, [source])
    before = made.stat()
    source.touch()
    assert "is up to date" in build.build(made, [source])
    assert (made.stat().st_ino, made.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert "native: built" in build.build(made, [source], flags=["-g"])
    (source.parent / "number.h").write_text("#define NUMBER 2\n")
    assert "native: built" in build.build(made, [source], flags=["-g"])
    source.write_text(SOURCE + "\n")
    assert "native: built" in build.build(made, [source], flags=["-g"])
    assert "native: built" in build.build(made, [source], flags=["-g"], force=True)
    assert "is up to date" in build.build(made, [source], flags=["-g"])


def test_without_a_compiler_what_is_up_to_date_stays_and_what_is_not_goes(
    source: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "g++")
    build.build(made, [source])
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    assert "is up to date" in build.build(made, [source])
    source.write_text(SOURCE + "\n")
    with pytest.raises(build.Unavailable, match=r"no C\+\+ compiler: g\+\+ was not found; install g\+\+ or set CXX"):
        build.build(made, [source])
    assert not made.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int f() { return; }", "return-statement with no value"),
        ("int f(int unused) { return 1; }", "unused parameter"),
        ('extern "C" int cudaFree(void*);\nint f() { return cudaFree(nullptr); }', "undefined reference to"),
    ],
    ids=["error", "warning", "symbol that torch lacks"],
)
def test_what_the_compiler_says_is_in_the_error_and_the_old_library_is_gone(
    source: Path, made: Path, text: str, message: str
) -> None:
    build.build(made, [source])
    source.write_text(text)
    with pytest.raises(build.CompileError, match=message):
        build.build(made, [source])
    assert not made.exists()


def test_a_warning_can_be_let_pass_and_the_result_is_up_to_date_for_both(source: Path, made: Path) -> None:
    source.write_text("int f(int unused) { return 1; }")
    assert "native: built" in build.build(made, [source], strict=False)
    assert "is up to date" in build.build(made, [source])


def test_no_torch_and_no_sources_are_told(source: Path, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(build.Unavailable, match=r"no C\+\+ sources"):
        build.build(made, [])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(build.sysconfig, "get_path", lambda name: str(made.parent))
    with pytest.raises(build.Unavailable, match="torch is not installed for"):
        build.build(made, [source])


def test_a_torch_that_pip_hides_from_an_isolated_build_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    there = build.installed_torch()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(build.sysconfig, "get_path", lambda name: str(there.folder.parent))
    assert build.installed_torch() == there


@pytest.mark.parametrize(
    ("version", "message"), [("2.10.1", "torch 2.10.1 is older than 2.11"), (None, "no C.. headers")]
)
def test_a_torch_that_does_not_serve_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str | None, message: str
) -> None:
    package = tmp_path / "torch"
    header = package / "include" / "torch" / "headeronly" / "version.h"
    header.parent.mkdir(parents=True)
    (package / "__init__.py").touch()
    if version is not None:
        header.write_text(f'#define TORCH_VERSION \\\n  "{version}"\n')
    found = importlib.util.spec_from_file_location("torch", package / "__init__.py")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    with pytest.raises(build.Unavailable, match=message):
        build.installed_torch()


@pytest.mark.parametrize(("extra", "code"), [([], 1), (["--optional"], 0)])
def test_the_command_line_fails_without_a_compiler_unless_it_is_optional(
    extra: list[str],
    code: int,
    source: Path,
    made: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["build.py", str(source), "--output", str(made), *extra])
    assert build.main() == 0
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert build.main() == code
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("native: built number.so")
    assert second.startswith("native: not built, launches go through Python: no C++ compiler: no-such-compiler was not")
