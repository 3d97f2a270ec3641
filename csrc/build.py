"""Builds the native library: C++ by the LibTorch stable ABI, with a C++ compiler and the headers of a torch alone.

    python csrc/build.py      # csrc/*.cpp -> src/semisparse/native/launch.so, unless it is up to date
    python csrc/build.py --output fake.so --flag=-fsanitize=address csrc/tests/library.cpp

The Makefile, the build hook of the wheel and tests use it. It imports the standard library alone, not torch: headers
are found without an import. The result serves every torch from OLDEST_TORCH on, whichever torch it was built with.
"""

import argparse
import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
LIBRARY = HERE.parent / "src" / "semisparse" / "native" / "launch.so"
OLDEST_TORCH = (2, 11)
"""The stable ABI that is targeted; pyproject.toml asks for the same torch."""
_OLDEST = ".".join(map(str, OLDEST_TORCH))
TARGET = f"-DTORCH_TARGET_VERSION=0x{(OLDEST_TORCH[0] << 56) | (OLDEST_TORCH[1] << 48):016x}"
COMPILE = ("-std=c++20", "-O2", "-fPIC", "-pthread", "-fvisibility=hidden", "-Wall", "-Wextra", TARGET)
LINK = ("-shared", "-pthread", "-Wl,-z,defs", "-Wl,--no-as-needed", "-ltorch_cpu", "-Wl,--as-needed", "-ldl")
"""`defs` makes a missing symbol an error here and not at load. No rpath: whoever loads the library has loaded torch."""


class Unavailable(Exception):
    """This machine can't build the library; the message says what is missing. Launches then go through Python."""


class CompileError(Exception):
    """The compiler refused the sources; the message holds its output."""


@dataclass(frozen=True)
class Torch:
    """An installed torch.

    Attributes:
        version: Such as "2.13.0".
        folder: Holds include/ and lib/.
    """

    version: str
    folder: Path


def build(
    output: Path = LIBRARY,
    sources: Sequence[Path] | None = None,
    flags: Sequence[str] = (),
    force: bool = False,
    strict: bool = True,
) -> str:
    """Compile and link, unless output is up to date. An output that is not is removed first.

    The linker writes a digest of the sources, the flags and the version of torch into output as its build id. Output is
    up to date if it holds that digest, so dates of files don't matter.

    Args:
        output: The shared library to write. It appears whole or not at all.
        sources: C++ files; None: csrc/*.cpp. Headers are looked for in csrc/.
        flags: Added to both compiling and linking, such as -fsanitize=address.
        force: Build even if output is up to date.
        strict: Whether a warning is an error. The result is the same.

    Returns:
        One line that says what was done.

    Raises:
        Unavailable: If torch, the compiler or sources are missing, or on another system than Linux.
        CompileError: If the compiler fails.
    """
    torch = installed_torch()
    files = sorted(HERE.glob("*.cpp") if sources is None else [Path(source).resolve() for source in sources])
    if not files:
        raise Unavailable("no C++ sources are given or in csrc/")
    digest = _digest(files, flags, torch)
    if not force and output.is_file() and bytes.fromhex(digest) in output.read_bytes():
        return f"native: {output.name} is up to date ({_size(output)}, built with torch {torch.version})"
    output.unlink(missing_ok=True)  # if the build fails, nothing shall load what other sources made
    command = compiler()
    warnings = ["-Werror"] if strict else []
    _compile([*command, *warnings], files, flags, torch, digest, output)
    made = f"native: built {output.name} ({_size(output)}) with {command[0]} and torch {torch.version}"
    return f"{made}, for torch >= {_OLDEST}"


def installed_torch() -> Torch:
    """The torch of this Python, found without importing it.

    pip hides the packages of the environment from an isolated build, but not the folder that they are in. Looking there
    is safe, since the result does not depend on the version of torch.

    Raises:
        Unavailable: If there is none, if it is older than OLDEST_TORCH, or if it has no headers.
    """
    spec = importlib.util.find_spec("torch")
    visible = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
    folders = [folder for folder in (*visible, Path(sysconfig.get_path("platlib")) / "torch") if folder.is_dir()]
    if not folders:
        raise Unavailable(f"torch is not installed for {sys.executable}")
    header = folders[0] / "include" / "torch" / "headeronly" / "version.h"
    found = re.search(r'#define TORCH_VERSION \\?\s*"([^"]+)"', header.read_text()) if header.is_file() else None
    if found is None:
        raise Unavailable(f"the torch in {folders[0]} has no C++ headers of the stable ABI")
    version = found[1]
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TORCH:
        raise Unavailable(f"torch {version} is older than {_OLDEST}")
    return Torch(version, folders[0])


def compiler() -> list[str]:
    """The command of the C++ compiler: the environment variable CXX, or g++.

    Raises:
        Unavailable: If it is not there, or on another system than Linux.
    """
    if not sys.platform.startswith("linux"):
        raise Unavailable(f"the native library is for Linux, and this is {sys.platform}")
    command = shlex.split(os.environ.get("CXX") or "g++")
    if shutil.which(command[0]) is None:
        raise Unavailable(f"no C++ compiler: {command[0]} was not found; install g++ or set CXX")
    return command


def _compile(
    command: list[str], files: Sequence[Path], flags: Sequence[str], torch: Torch, digest: str, output: Path
) -> None:
    """Compile files side by side, link them, and move the result to output in one step."""
    include = torch.folder / "include"
    # Paths in messages of failed checks shall not depend on where the library was built.
    neutral = [f"-ffile-prefix-map={HERE}=csrc", f"-ffile-prefix-map={include}=include"]
    front = [*command, *COMPILE, *flags, *neutral, "-I", str(HERE), "-isystem", str(include)]
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".build-") as scratch:
        objects = [str(Path(scratch) / f"{index}-{file.stem}.o") for index, file in enumerate(files)]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(
                pool.map(
                    lambda pair: _run([*front, "-c", str(pair[0]), "-o", pair[1]]), zip(files, objects, strict=True)
                )
            )
        linked = Path(scratch) / output.name
        identity = f"-Wl,--build-id=0x{digest}"
        _run([*command, *objects, f"-L{torch.folder / 'lib'}", *LINK, *flags, identity, "-o", str(linked)])
        linked.replace(output)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise CompileError(f"{shlex.join(command)}\n{done.stdout}")


def _digest(files: Sequence[Path], flags: Sequence[str], torch: Torch) -> str:
    """What output depends on: all files that a compilation may read, flags, compiler and torch."""
    headers = sorted(path for folder in {HERE, *(file.parent for file in files)} for path in folder.glob("*.h"))
    whole = hashlib.sha256()
    for part in (*COMPILE, *LINK, *flags, os.environ.get("CXX") or "g++", torch.version):
        whole.update(part.encode() + b"\0")
    for path in (*files, *headers):
        whole.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return whole.hexdigest()


def _size(path: Path) -> str:
    return f"{path.stat().st_size / 1000:.0f} kB"


def main() -> int:
    """The command line.

    Returns:
        Exit code: 0 if output is there and up to date, or with --optional if this machine can't build it; else 1.
    """
    parser = argparse.ArgumentParser(description="Build the native library of semisparse.")
    parser.add_argument("sources", nargs="*", type=Path, help="C++ files; default: csrc/*.cpp")
    parser.add_argument(
        "--output", type=Path, default=LIBRARY, help="the shared library to write (default: %(default)s)"
    )
    parser.add_argument("--flag", action="append", default=[], help="added to compiling and linking; may be repeated")
    parser.add_argument("--force", action="store_true", help="build even if the output is up to date")
    parser.add_argument("--optional", action="store_true", help="a missing compiler or torch is not a failure")
    asked = parser.parse_args()
    try:
        print(build(asked.output, asked.sources or None, asked.flag, asked.force))
    except Unavailable as missing:
        print(f"native: not built, launches go through Python: {missing}")
        return 0 if asked.optional else 1
    except CompileError as error:
        print(f"native: the compiler failed\n{error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
