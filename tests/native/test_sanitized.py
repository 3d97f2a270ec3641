"""The tests of the ops again, on a library built with the address and undefined-behaviour sanitizers."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from csrc import build
from tests.arch.source import ROOT
from tests.conftest import EVERY_CASE
from tests.native.building import SOURCES, compiler, locked, sanitized
from tests.native.hot import BUILT

FILES = (
    "test_asked.py",
    "test_dense_products.py",
    "test_fp8.py",
    "test_fp8_sampling.py",
    "test_packing.py",
    "test_products.py",
    "test_structures.py",
)
REPORT = re.compile(r"ERROR: AddressSanitizer|runtime error:")
SETTINGS = {
    # Tests ask for more memory than there is, on purpose.
    "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:exitcode=77",
    "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1:exitcode=77",
}


FOR_EVERY_CASE = pytest.mark.skipif(
    not EVERY_CASE,
    reason="walks stacks for a minute and a half; SEMISPARSE_EVERY_CASE=1 runs it",
)

# The fast way to walk a stack ends at code without frame pointers, as in libtorch_cpu.
FOR_LEAKS = {
    "PYTHONMALLOC": "malloc",
    "ASAN_OPTIONS": SETTINGS["ASAN_OPTIONS"].replace(
        "detect_leaks=0", "detect_leaks=1:malloc_context_size=5:fast_unwind_on_malloc=0"
    ),
    "LSAN_OPTIONS": "exitcode=0",
}


def run(library: Path, *selected: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """The tests of the ops in a process of their own, on that library."""
    runtime = [
        subprocess.run([*compiler(), f"-print-file-name=lib{name}.so"], capture_output=True, text=True, check=True)
        for name in ("asan", "ubsan")
    ]
    preloaded = " ".join(found.stdout.strip() for found in runtime)
    tests = [str(Path(__file__).with_name(name)) for name in FILES]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    # pytest keeps what is written to Python's stderr, and a report goes past that.
    options = ("-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--capture=sys")
    return subprocess.run(
        [sys.executable, "-m", "pytest", *options, *tests, *selected],
        cwd=ROOT, env=kept | SETTINGS | variables | {"LD_PRELOAD": preloaded, BUILT: str(library)},
        text=True, timeout=600, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def built() -> Path:
    flags = instrumented()
    with locked("sanitized.so") as path:
        build.build(path, [SOURCES / "library.cpp"], flags)
    return path


def instrumented(optimised: str = "-O1") -> tuple[str, ...]:
    return optimised, *sanitized("address", "undefined")


@pytest.mark.slow
def test_no_sanitizer_reports_anything() -> None:
    done = run(built())
    assert done.returncode == 0, done.stdout[-5000:]
    assert not REPORT.search(done.stdout)
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None and int(passed[1]) > 200
    assert "skipped" not in done.stdout


def lost(said: str) -> list[str]:
    """Reports of memory that our C++, or libtorch_cpu for it, never freed. Python itself keeps memory until it ends."""
    assert re.search(r"\d+ passed", said), said[-5000:]
    leaks = re.findall(r"(?:Direct|Indirect) leak of .*?\n\n", said, re.DOTALL)
    assert leaks  # Python's
    return [leak for leak in leaks if re.search(r"semisparse|torch::stable|libtorch_cpu", leak)]


@FOR_EVERY_CASE
@pytest.mark.slow
def test_no_memory_is_lost_in_the_library() -> None:
    # Without what imports torch's compiler, which in torch 2.11 loses storages of its own.
    selected = "not compiled_code and not torchs_own_check"
    assert lost(run(built(), "-k", selected, **FOR_LEAKS).stdout) == []


DEFECTS = {
    "a workspace a byte too small": (
        "ops.h", "allocate<Device>({bytes}", "allocate<Device>({bytes - 1}",
        "test_a_workspace_is_allocated_per_call", "heap-buffer-overflow",
    ),
    "a shift by more bits than there are": (
        "keys.h", "int64_t{bias} << 8", "int64_t{bias} << (dtype + 60)",
        "test_the_first_call_is_pythons", "shift exponent",
    ),
    "a message read after it was freed": (
        "ops.h", "if (message.numel() == 0) return;",
        "if (message.numel() == 0) return;\n  auto* freed = new volatile int(1); delete freed; if (*freed > 9) return;",
        "test_an_exception_belongs_to_the_thread", "heap-use-after-free",
    ),
}  # fmt: skip


def with_defect(scratch: Path, file: str, right: str, wrong: str) -> Path:
    """The library, built from sources in which right is replaced; unoptimised, which builds in half the time."""
    shutil.copytree(ROOT / "csrc", scratch / "csrc")
    changed = scratch / "csrc" / file
    assert changed.read_text().count(right) == 1
    changed.write_text(changed.read_text().replace(right, wrong))
    build.build(scratch / "library.so", [scratch / "csrc" / "tests" / "library.cpp"], instrumented("-O0"))
    return scratch / "library.so"


@pytest.mark.slow
@pytest.mark.parametrize("defect", DEFECTS)
def test_a_planted_defect_is_reported(defect: str, tmp_path: Path) -> None:
    *change, selected, report = DEFECTS[defect]
    done = run(with_defect(tmp_path, *change), "-k", selected)
    assert done.returncode != 0
    assert report in done.stdout
    assert REPORT.search(done.stdout)


@FOR_EVERY_CASE
@pytest.mark.slow
def test_a_planted_leak_is_found(tmp_path: Path) -> None:
    library = with_defect(tmp_path, "text.h", "if (handle_ != nullptr) torch_delete_string(handle_);", "")
    assert lost(run(library, "-k", "test_the_first_call", **FOR_LEAKS).stdout)
