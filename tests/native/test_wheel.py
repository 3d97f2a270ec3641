"""The build hook: a wheel with the library and a platform tag, or a pure one with the reason; the sdist."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.arch.source import PACKAGE, ROOT

pytest.importorskip("hatchling", reason="builds wheels; part of the dev extra")

LAUNCH = "semisparse/native/launch.so"
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The source tree with a C++ source that compiles faster, and no library."""
    root = tmp_path / "tree"
    left_out = shutil.ignore_patterns("__pycache__", "launch.so")
    shutil.copytree(PACKAGE, root / "src" / "semisparse", ignore=left_out)
    (root / "csrc" / "tests").mkdir(parents=True)
    shutil.copy(ROOT / "csrc" / "build.py", root / "csrc")
    (root / "csrc" / "launch.cpp").write_text("int semisparse_launch() { return 1; }\n")
    (root / "csrc" / "tests" / "fake.cpp").touch()
    hooks = ("hatch_build.py", "hatch_metadata.py")
    for name in (".gitignore", "CHANGELOG.md", "LICENSE", "README.md", *hooks, "pyproject.toml"):
        shutil.copy(ROOT / name, root)
    return root


def run(tree: Path, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in ("CXX", "SEMISPARSE_BUILD_NATIVE", "SEMISPARSE_URL")
    }
    return subprocess.run(
        [sys.executable, *command], cwd=tree, env=kept | variables, text=True, timeout=120, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def wheel(tree: Path, **variables: str) -> tuple[Path, str]:
    """The wheel, and what the build said."""
    done = run(tree, "-m", "hatchling", "build", "-t", "wheel", **variables)
    assert done.returncode == 0, done.stdout
    (found,) = (tree / "dist").glob("*.whl")
    return found, done.stdout


@needs_compiler
def test_with_a_compiler_the_wheel_holds_the_library_and_serves_one_platform_and_every_python(tree: Path) -> None:
    found, said = wheel(tree, SEMISPARSE_BUILD_NATIVE="1")
    python, abi, platform = found.stem.split("-")[2:]
    assert (python, abi) == ("py3", "none")
    assert platform.startswith("linux_")
    assert "native: built launch.so (" in said
    assert f"for torch >= 2.11; wheel py3-none-{platform}" in said
    with zipfile.ZipFile(found) as archive:
        assert archive.read(LAUNCH).startswith(b"\x7fELF")
        (about,) = (name for name in archive.namelist() if name.endswith(".dist-info/WHEEL"))
        assert "Root-Is-Purelib: false" in archive.read(about).decode()
        assert not [name for name in archive.namelist() if "csrc" in name or name.endswith((".cpp", ".h"))]


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"CXX": "no-such-compiler"}, "no C++ compiler: no-such-compiler was not found"),
        ({"SEMISPARSE_BUILD_NATIVE": "0"}, "SEMISPARSE_BUILD_NATIVE=0"),
    ],
    ids=["no compiler", "not wanted"],
)
def test_without_the_library_the_wheel_is_pure_says_why_and_works(
    tree: Path, variables: dict[str, str], reason: str
) -> None:
    (tree / "src" / LAUNCH).write_text("of an earlier build")
    found, said = wheel(tree, **variables)
    assert found.name.endswith("-py3-none-any.whl")
    assert "SEMISPARSE_URL is not set: links of the page stay relative" in said
    assert f"left out, wheel py3-none-any; launches will go through Python: {reason}" in said
    with zipfile.ZipFile(found) as archive:
        assert LAUNCH not in archive.namelist()
        archive.extractall(tree / "installed")
    code = (
        "import torch, semisparse; from semisparse import native;"
        "layer = semisparse.SemiSparseLinear.from_dense(torch.nn.Linear(16, 16));"
        "layer(torch.ones(2, 16)).sum().backward();"
        "print(semisparse.__file__, native.status(), layer.weight.grad.shape)"
    )
    done = run(tree, "-c", code, PYTHONPATH=str(tree / "installed"))
    assert done.returncode == 0, done.stdout
    assert str(tree / "installed") in done.stdout
    assert "Status(loaded=False, reason='not built: launch.so is not there" in done.stdout
    assert "torch.Size([16, 16])" in done.stdout


def test_a_library_that_is_required_and_cannot_be_built_is_an_error(tree: Path) -> None:
    done = run(tree, "-m", "hatchling", "build", "-t", "wheel", SEMISPARSE_BUILD_NATIVE="1", CXX="no-such-compiler")
    assert done.returncode != 0
    assert "SEMISPARSE_BUILD_NATIVE=1, and the native library can't be built: no C++ compiler: no-such" in done.stdout
    assert not (tree / "dist").exists() or not list((tree / "dist").glob("*.whl"))


def test_a_value_that_means_nothing_is_an_error(tree: Path) -> None:
    done = run(tree, "-m", "hatchling", "build", "-t", "wheel", SEMISPARSE_BUILD_NATIVE="yes")
    assert done.returncode != 0
    assert "SEMISPARSE_BUILD_NATIVE is 'yes'; use 1 (required), 0 (left out)" in done.stdout


def test_a_release_has_addresses_and_links_that_hold_on_an_index(tree: Path) -> None:
    address = "https://example.org/someone/semisparse"
    found, said = wheel(tree, SEMISPARSE_BUILD_NATIVE="0", SEMISPARSE_URL=f"{address}/")
    with zipfile.ZipFile(found) as archive:
        (about,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        text = archive.read(about).decode()
    tag = f"v{found.name.split('-')[1]}"
    assert f"Project-URL: Changelog, {address}/blob/{tag}/CHANGELOG.md" in text and "stay relative" not in said
    assert f"]({address}/raw/{tag}/docs/img/speed.svg)" in text and f"]({address}/blob/{tag}/docs/tutorial.md)" in text
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert len(links) > 20 and all(link.startswith(("https://", "#")) for link in links)
    done = run(tree, "-m", "hatchling", "build", "-t", "wheel", SEMISPARSE_URL="example")
    assert done.returncode and "SEMISPARSE_URL='example' is no address of a repository" in done.stdout


@pytest.mark.parametrize(("value", "asked"), [("", []), ("0", []), ("1", ["torch>=2.11"])])
def test_torch_is_a_requirement_of_the_build_only_where_the_library_is_required(
    tree: Path, value: str, asked: list[str]
) -> None:
    code = "import hatchling.build; print(hatchling.build.get_requires_for_build_wheel())"
    assert run(tree, "-c", code, SEMISPARSE_BUILD_NATIVE=value).stdout.splitlines()[-1] == str(asked)


def test_the_sdist_holds_what_builds_the_library_and_not_the_library(tree: Path) -> None:
    (tree / "src" / LAUNCH).write_text("of an earlier build")
    done = run(tree, "-m", "hatchling", "build", "-t", "sdist")
    assert done.returncode == 0, done.stdout
    (found,) = (tree / "dist").glob("*.tar.gz")
    with tarfile.open(found) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {
        "csrc/build.py",
        "csrc/launch.cpp",
        "hatch_build.py",
        "hatch_metadata.py",
        "src/semisparse/native/__init__.py",
    } < names
    assert "csrc/tests/fake.cpp" not in names
    assert f"src/{LAUNCH}" not in names


def test_the_sdist_gives_the_wheel_of_the_tree(tree: Path) -> None:
    done = run(tree, "-m", "hatchling", "build", "-t", "sdist")
    assert done.returncode == 0, done.stdout
    (found,) = (tree / "dist").glob("*.tar.gz")
    shutil.unpack_archive(found, tree / "unpacked", filter="data")
    (unpacked,) = (tree / "unpacked").iterdir()
    wheels = [wheel(root, SEMISPARSE_BUILD_NATIVE="0")[0] for root in (tree, unpacked)]
    of_tree, of_sdist = ({entry.filename: entry.CRC for entry in zipfile.ZipFile(one).infolist()} for one in wheels)
    assert of_sdist == of_tree
    assert "semisparse/py.typed" in of_tree
