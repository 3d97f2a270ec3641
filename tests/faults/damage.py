"""Files that are not as they were written: flipped bits, cut off, empty, of another kind, or that cannot be read."""

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

from semisparse.errors import SemiSparseError
from tests.faults.fault import Fault
from tests.faults.kinds import KINDS, Kind


def found_in(kind: Kind, folder: Path, original: object) -> str:
    """ "refused", "ignored", "same" or "other": what reading gives; any untyped error comes through."""
    try:
        found = kind.read(folder)
    except SemiSparseError as error:
        assert str(error).splitlines()[0].isprintable(), "the message is not printable"
        return "refused"
    if found == original:
        return "same"
    return "ignored" if found in (None, []) else "other"


def damaged(kind: Kind, folder: Path) -> tuple[Path, bytes, object]:
    """A whole file of a kind, its bytes and what reading it gives."""
    kind.make(folder)
    path, original = folder / kind.file, kind.read(folder)
    assert original not in (None, []), "the file as written is not read"
    return path, path.read_bytes(), original


def flips(kind: Kind, count: int, folder: Path) -> dict[str, int]:
    """Flip one bit at a time, at random places."""
    path, content, original = damaged(kind, folder)
    draw, seen = random.Random(count), dict.fromkeys(("refused", "ignored", "same", "other"), 0)
    for _ in range(count):
        place, bit = draw.randrange(len(content)), draw.randrange(8)
        changed = bytearray(content)
        changed[place] ^= 1 << bit
        path.write_bytes(changed)
        try:
            seen[result := found_in(kind, folder, original)] += 1
        except Exception as error:
            raise AssertionError(f"bit {bit} of byte {place}: {type(error).__name__}: {error}") from error
        if result == "other" and kind.guard == "checksum":
            raise AssertionError(f"bit {bit} of byte {place} is flipped, and another content is loaded")
    return _counted(seen)


def cuts(kind: Kind, count: int, folder: Path) -> dict[str, int]:
    """Cut the file off at random places, the first and the last byte among them; and nothing at all."""
    path, content, original = damaged(kind, folder)
    draw, seen = random.Random(count), dict.fromkeys(("refused", "ignored", "same", "other"), 0)
    places = [0, 1, len(content) - 1, *(draw.randrange(len(content)) for _ in range(max(0, count - 3)))]
    for place in places[:count]:
        path.write_bytes(content[:place])
        try:
            seen[result := found_in(kind, folder, original)] += 1
        except Exception as error:
            raise AssertionError(f"cut off at byte {place}: {type(error).__name__}: {error}") from error
        if result == "other" and not kind.name.endswith("CSV"):  # any number of lines makes a table
            raise AssertionError(f"cut off at byte {place}, and something is loaded")
    return _counted(seen)


def foreign(kind: Kind, count: int, folder: Path) -> dict[str, int]:
    """Files of all other kinds in the place of this one."""
    path, _, original = damaged(kind, folder)
    seen = dict.fromkeys(("refused", "ignored", "same", "other"), 0)
    others = [other for other in KINDS if other.name != kind.name][:count]
    for other in others:
        there = folder / f"other-{other.name}"
        there.mkdir()
        other.make(there)
        path.write_bytes((there / other.file).read_bytes())
        try:
            seen[result := found_in(kind, folder, original)] += 1
        except Exception as error:
            raise AssertionError(f"a {other.name} instead: {type(error).__name__}: {error}") from error
        # What check_checkpoint reads are safetensors of any program.
        if result == "other" and not (kind.name == "safetensors" and other.name == "checkpoint"):
            raise AssertionError(f"a {other.name} is loaded as a {kind.name}")
    return _counted(seen)


UNREADABLE: dict[str, Callable[[Path], object]] = {
    "reading fails (EIO)": lambda path: path.symlink_to("/proc/self/mem"),  # no memory is at its beginning
    "a folder": lambda path: path.mkdir(),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
}


def unreadable(kind: Kind, count: int, folder: Path) -> dict[str, int]:
    """Something that cannot be read is in the place of the file."""
    seen = dict.fromkeys(("refused", "ignored", "same", "other"), 0)
    for turn in range(count):
        what, there = list(UNREADABLE)[turn % len(UNREADABLE)], folder / str(turn)
        there.mkdir()
        path, _, original = damaged(kind, there)
        path.unlink()
        UNREADABLE[what](path)
        try:
            seen[result := found_in(kind, there, original)] += 1
        except Exception as error:
            raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
        assert result in ("refused", "ignored"), f"{what}: it is {result}"
    return _counted(seen)


def _counted(seen: dict[str, int]) -> dict[str, int]:
    words = {
        "refused": "refused with a typed error",
        "ignored": "ignored",
        "same": "read as they were",
        "other": "read as other values",
    }
    return {words[name]: count for name, count in seen.items()}


def _flips(kind: Kind) -> Fault:
    sealed = kind.guard == "checksum"
    return Fault(
        f"flipped bits, files {'with' if sealed else 'without'} a checksum",
        kind.name,
        "a typed error, ignored, or read as they were" if sealed else "no other error than a typed one",
        25 if sealed else 10,
        500,
        partial(flips, kind),
        "files",
        ""
        if sealed
        else "a value that is flipped is read as it stands; safetensors, indices, idx files "
        "and curves come from others",
    )


FAULTS = [
    *(_flips(kind) for kind in KINDS),
    *(Fault("files cut off", kind.name, "a typed error or ignored; fewer lines of CSV are a shorter curve", 5, 100,
            partial(cuts, kind), "files") for kind in KINDS),
    *(Fault("files of another kind", kind.name, "a typed error or ignored", 2, len(KINDS) - 1, partial(foreign, kind),
            "files") for kind in KINDS),
    *(Fault("files that cannot be read", kind.name, "a typed error or ignored", 2, len(UNREADABLE),
            partial(unreadable, kind), "files") for kind in KINDS),
]  # fmt: skip
