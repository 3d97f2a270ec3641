"""What a process writes: paths that it opens for writing, makes, renames, links, changes or removes.

python tests/written.py LIST MODULE ARGUMENTS...     run a module as `python -m` does; LIST gets a path per line
"""

import os
import re
import runpy
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = {  # event -> which of its arguments are paths
    "os.mkdir": (0,), "os.remove": (0,), "os.rmdir": (0,), "os.rename": (0, 1), "os.link": (1,), "os.symlink": (1,),
    "os.truncate": (0,), "os.chmod": (0,), "os.chown": (0,), "os.utime": (0,), "shutil.move": (0, 1),
}  # fmt: skip

CACHES = ("__pycache__", "matplotlib", "semisparse-inductor-")
"""Names of folders, or how they begin, in which Python and packages keep what they would only make again."""

SYSTEM = ("/dev/null", "/proc/self/")
"""What is written there is no file; the peak of memory is reset in the second one."""

ASIDE = re.compile(r"(tmp\w+|\.semisparse-[0-9a-f]{16}-[0-9a-f]{16})\.tmp")
"""Names of files that are written beside FILE of an option, and then renamed to it."""

_lists: list[list[Path]] = []
_hooked = False


def _hear(event: str, arguments: tuple[Any, ...]) -> None:
    if not _lists:
        return
    if event == "open":
        found = [arguments[0]] if isinstance(arguments[2], int) and arguments[2] & _WRITES else []
    else:
        found = [arguments[at] for at in _CHANGES.get(event, ())]
    for one in found:
        if isinstance(one, str | bytes | os.PathLike):  # a number is a file that is open already
            path = Path(os.path.abspath(os.fsdecode(one)))
            for paths in _lists:
                paths.append(path)


@contextmanager
def watched() -> Iterator[list[Path]]:
    """The paths that this process writes to inside the block."""
    global _hooked
    if not _hooked:
        sys.addaudithook(_hear)  # which stays for as long as the process lives
        _hooked = True
    paths: list[Path] = []
    _lists.append(paths)
    try:
        yield paths
    finally:
        _lists.remove(paths)


def elsewhere(paths: Iterable[Path], *outputs: Path) -> list[str]:
    """Those of some paths that are no part of any output.

    Args:
        paths: As watched gives them.
        *outputs: Folders or files that may be written, with all that is below them; folders above them may be made.
    """
    given = [Path(os.path.abspath(output)) for output in outputs]
    return sorted({str(path) for path in paths if not (_is_cache(path) or any(_part_of(path, one) for one in given))})


def _part_of(path: Path, output: Path) -> bool:
    """Whether it is the output, below it, above it, or a file that becomes it by a new name."""
    if path == output or output in path.parents or path in output.parents:
        return True
    return path.parent == output.parent and ASIDE.fullmatch(path.name) is not None


def _is_cache(path: Path) -> bool:
    return any(part.startswith(CACHES) for part in path.parts) or str(path).startswith(SYSTEM)


def main(arguments: Sequence[str]) -> None:
    """Run a module and write what it wrote.

    Args:
        arguments: LIST, MODULE, and those of the module.
    """
    target, module, *rest = arguments
    sys.argv = [module, *rest]
    sys.path.pop(0)  # the folder of this file, which is no place for modules
    with watched() as paths:
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        finally:
            found = sorted({str(path) for path in paths})
            Path(target).write_text("\n".join(found), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
