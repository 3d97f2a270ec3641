"""Addresses of cuSPARSELt's functions in the library that its bindings have loaded, for the native launch layer."""

import ctypes
import os
from pathlib import Path


def addresses(*names: str) -> tuple[int, ...]:
    """Where functions of the loaded cuSPARSELt lie in memory.

    Call it after the library was used, so that it is loaded.

    Args:
        *names: Of C functions.

    Returns:
        Their addresses; zeros for all where they cannot be told for certain.
    """
    try:
        from nvmath.bindings._internal.cusparseLt import _inspect_function_pointer

        found = tuple(int(_inspect_function_pointer(f"__{name}")) for name in names)
    except Exception:
        # Not part of nvmath's public interface, so any error may come; the only library in memory is as good.
        found = _in_memory(names)
    return found if all(found) else (0,) * len(names)


def _in_memory(names: tuple[str, ...], maps: Path = Path("/proc/self/maps")) -> tuple[int, ...]:
    """From the one cuSPARSELt that this process has mapped; of two, which made the plans is not known."""
    lines = maps.read_text().splitlines() if maps.exists() else []
    paths = {line.split(maxsplit=5)[5] for line in lines if "libcusparseLt.so" in line}
    if len(paths) != 1:
        return (0,) * len(names)
    try:
        library = ctypes.CDLL(paths.pop(), mode=os.RTLD_NOLOAD | os.RTLD_NOW)
        return tuple(ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0 for name in names)
    except (OSError, AttributeError):  # the file was replaced, or has other functions
        return (0,) * len(names)
