"""The native library: CUDA implementations of the hot ops in C++ (sources in csrc/), or why they are not there.

csrc/build.py builds it. It's optional: without it Python implements the same ops, and each launch costs the host more.
"""

import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

VARIABLE = "SEMISPARSE_NATIVE"
"""0 switches the native library off. Read once per process, at the first question."""
LIBRARY = Path(__file__).with_name("launch.so")


@dataclass(frozen=True, slots=True)
class Status:
    """Whether the native library is in use.

    Attributes:
        loaded: Whether it is loaded into this process.
        reason: Why not, or what was loaded.
    """

    loaded: bool
    reason: str


@cache
def status() -> Status:
    """Load the native library, unless that was done before, and say how it went. Never raises."""
    if os.environ.get(VARIABLE) == "0":
        return Status(False, f"switched off by {VARIABLE}=0")
    if not LIBRARY.is_file():
        return Status(False, f"not built: {LIBRARY.name} is not there")
    try:
        torch.ops.load_library(LIBRARY)
    except Exception as error:  # a library that does not fit this torch can fail in any way
        return Status(False, f"cannot be loaded: {type(error).__name__}: {error}")
    return Status(True, f"{LIBRARY.name} is loaded")
