"""What the native library asks of others: the stable functions of torch 2.11, and the C and C++ runtime."""

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from csrc import build
from tests.arch.source import ROOT

pytestmark = pytest.mark.skipif(
    not all(map(shutil.which, ("nm", "readelf", "g++"))), reason="needs g++ and binutils, which read the library"
)
MANYLINUX_2_34 = {"GLIBC": (2, 34), "GLIBCXX": (3, 4, 29), "CXXABI": (1, 3, 13), "GCC": (7, 0, 0)}
"""PEP 600's newest versions of the runtime for that tag, as auditwheel lists them."""
OF_THE_LINKER = {"_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable", "__gmon_start__"}
SHIM = """
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_aten.h>
#include <torch/csrc/stable/c/shim.h>
"""


def output(*command: object, given: str | None = None) -> str:
    return subprocess.run(list(map(str, command)), input=given, capture_output=True, text=True, check=True).stdout


def undefined(library: Path) -> dict[str, str]:
    """Symbol -> version of the runtime that it needs, such as GLIBC_2.34; "" for one without versions."""
    names = [line.split()[-1] for line in output("nm", "-D", "--undefined-only", library).splitlines()]
    return {symbol: version.strip("@") for symbol, _, version in (name.partition("@") for name in names)}


def declared(*target: str) -> set[str]:
    """Functions that the headers of this torch promise to a library for the target, by default for this torch."""
    headers = Path(torch.__path__[0]) / "include"
    text = output("g++", "-std=c++20", "-E", "-P", "-x", "c++", *target, "-isystem", headers, "-", given=SHIM)
    return set(re.findall(r"\b((?:aoti_)?torch_\w+)\s*\(", text))


@pytest.fixture(scope="module")
def shim() -> set[str]:
    return declared(build.TARGET)


def foreign(symbols: dict[str, str], shim: set[str]) -> set[str]:
    """Symbols that are neither of the shim nor of the C and C++ runtime."""
    return {symbol for symbol, version in symbols.items() if not version} - shim - OF_THE_LINKER


def test_all_it_needs_is_the_runtime_and_the_stable_functions_of_the_oldest_torch(
    library: Path, shim: set[str]
) -> None:
    found = undefined(library)
    assert {"torch_call_dispatcher", "aoti_torch_get_data_ptr"} < found.keys() & shim
    assert foreign(found, shim) == set()


@pytest.mark.parametrize("name", ["PyErr_Occurred", "cudaMalloc", "cuLaunchKernel", "_ZN3c105ErrorD1Ev", "torch_new"])
def test_a_function_of_python_cuda_or_the_unstable_torch_would_be_found(name: str, shim: set[str]) -> None:
    assert foreign({name: "", "memcpy": "GLIBC_2.14", "__gmon_start__": ""}, shim) == {name}


def test_functions_that_came_after_the_oldest_torch_are_not_in_the_list(shim: set[str]) -> None:
    newer = tuple(map(int, torch.__version__.split(".")[:2])) > build.OLDEST_TORCH
    assert declared() > shim if newer else declared() == shim


@pytest.mark.skipif(
    platform.libc_ver() > ("glibc", "2.36"), reason="a newer C library than where wheels for this tag are built"
)
def test_the_runtime_it_needs_is_that_of_manylinux_2_34(library: Path) -> None:
    needed = {version for version in undefined(library).values() if version}
    assert needed
    for version in needed:
        family, _, number = version.partition("_")
        assert tuple(map(int, number.split("."))) <= MANYLINUX_2_34[family], version


def test_it_names_torch_and_the_runtime_as_libraries_and_no_folder_to_look_in(library: Path) -> None:
    text = output("readelf", "-d", "--wide", library)
    needed = set(re.findall(r"\(NEEDED\).*\[(\S+)\]", text))
    assert "libtorch_cpu.so" in needed
    runtime = r"lib(stdc\+\+|gcc_s|c|m|dl|pthread)\.so\.\d+|ld-linux-.*"
    assert [name for name in needed - {"libtorch_cpu.so"} if not re.fullmatch(runtime, name)] == []
    assert "RPATH" not in text and "RUNPATH" not in text


def test_it_names_no_folder_of_the_machine_that_built_it(library: Path) -> None:
    found = library.read_bytes()
    assert b"csrc/" in found  # file names of failed checks are in it
    for folder in (ROOT, Path(torch.__path__[0])):
        assert str(folder).encode() not in found
