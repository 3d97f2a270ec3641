"""What is needed to start a compiled Triton kernel without Triton: its handle, and its parameters in order.

A compiled kernel takes the arguments that were not folded into it (integers equal to 1, None and constants are), in
their order, and then two pointers for scratch memory. That is Triton's convention and not documented, so the number of
parameters is compared with the kernel's own PTX, and a kernel that needs more than a plain launch is left to Triton.
"""

import re
from typing import Any, NamedTuple

from torch import Tensor

_SCRATCH = 2
"""Pointers behind the arguments: global scratch and profile scratch memory."""


class CompiledLaunch(NamedTuple):
    """A kernel whose grid and sizes are fixed.

    Attributes:
        kernel: Triton's compiled kernel, which owns function and must be kept.
        function: CUfunction, in the context of the device it was compiled for.
        grid: Programs along x, y and z.
        threads: Per program.
        shared_bytes: Dynamic shared memory per program.
        parameters: For each: the index of a pointer of the call, or -1, and the value where it is not a pointer.
    """

    kernel: Any
    function: int
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    parameters: tuple[tuple[int, int], ...]


def compiled_launch(
    kernel: Any, grid: tuple[int, int, int], pointers: tuple[Tensor | None, ...], sizes: tuple[int, ...]
) -> CompiledLaunch | str:
    """How a compiled kernel is started.

    Args:
        kernel: Triton's compiled kernel.
        grid: Programs along x, y and z.
        pointers: The kernel's first arguments; only which of them are None matters.
        sizes: The integer arguments behind them. Constants follow.

    Returns:
        The launch, or why only Triton can start this kernel.
    """
    metadata = kernel.metadata
    wanted = {
        "num_ctas": 1,
        "launch_cooperative_grid": False,
        "launch_pdl": False,
        "global_scratch_size": 0,
        "profile_scratch_size": 0,
    }
    for name, plain in wanted.items():
        if getattr(metadata, name, plain) not in (plain, None):
            return f"it has {name}={getattr(metadata, name)}"
    types = list(kernel.src.signature.values())
    values: list[int | None] = [None if pointer is None else index for index, pointer in enumerate(pointers)]
    parameters: list[tuple[int, int]] = []
    for position, kind in enumerate(types[: len(pointers) + len(sizes)]):
        if kind == "constexpr":
            continue
        if position < len(pointers):
            if not kind.startswith("*") or values[position] is None:
                return f"argument {position} is {kind}, not the pointer that was given"
            parameters.append((position, 0))
        elif kind in ("i32", "i64"):
            parameters.append((-1, sizes[position - len(pointers)]))
        else:
            return f"argument {position} is {kind}"
    if any(kind != "constexpr" for kind in types[len(pointers) + len(sizes) :]):
        return "a constant was not folded"
    parameters += [(-1, 0)] * _SCRATCH
    if (found := parameter_count(kernel.asm.get("ptx", ""))) != len(parameters):
        return f"its code takes {found} parameters, and {len(parameters)} were expected"
    return CompiledLaunch(
        kernel,
        int(kernel.function),
        grid,
        metadata.num_warps * getattr(metadata.target, "warp_size", 32),
        metadata.shared,
        tuple(parameters),
    )


def parameter_count(ptx: str) -> int:
    """Parameters of the one kernel in a PTX text."""
    entry = re.search(r"\.entry\s+[\w$]+\s*\(([^)]*)\)", ptx)
    return 0 if entry is None else entry[1].count(".param")
