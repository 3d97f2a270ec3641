"""Single programs of huge launches in Triton's interpreter, on memory that is only there where it is touched."""

import mmap
from contextlib import contextmanager

import torch
from triton.runtime import interpreter

_NO_RESERVE = 0x4000  # MAP_NORESERVE of Linux: pages that are never touched cost nothing, not even a promise


def untouched(shape, dtype):
    """A tensor of zeros of any size."""
    count = torch.Size(shape).numel()
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE
    return torch.frombuffer(mmap.mmap(-1, count * dtype.itemsize, flags=flags), dtype=dtype).view(shape)


@contextmanager
def only_programs(*chosen):
    """Launches within run these programs, (x, y) each, instead of their whole grid."""

    def run(executor, *arguments, **options):
        options = {name: value for name, value in options.items() if name in executor.arg_names}
        scope = interpreter._patch_lang(executor.fn)
        try:
            bound = dict(zip(executor.arg_names, arguments, strict=True)) | options
            bound = {
                name: value if name in executor.constexprs else interpreter._implicit_cvt(value)
                for name, value in bound.items()
            }
            interpreter.interpreter_builder.set_grid_dim(*executor.grid)
            for x, y in chosen:
                assert x < executor.grid[0] and y < executor.grid[1], f"no program {(x, y)} in {executor.grid}"
                interpreter.interpreter_builder.set_grid_idx(x, y, 0)
                executor.fn(**bound)
        finally:
            scope.restore()

    original = interpreter.GridExecutor.__call__
    interpreter.GridExecutor.__call__ = run
    try:
        yield
    finally:
        interpreter.GridExecutor.__call__ = original
