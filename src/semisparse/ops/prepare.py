"""What the Python implementations hand to the native library, so that the next such call runs without Python.

Each function is called after the Python implementation of an op has worked, with what it worked with. Nothing here
changes a result: a call that cannot be handed over goes through Python again.
"""

import logging
from ctypes import addressof
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from semisparse import native
from semisparse.config import Backend
from semisparse.formats.layout import ALIGNMENT
from semisparse.gemm.addresses import addresses
from semisparse.gemm.autotune.algorithm import Choice
from semisparse.gemm.autotune.autotuner import autotuner
from semisparse.gemm.chunks import can_be_cut
from semisparse.gemm.engine import engine
from semisparse.gemm.problem import Problem
from semisparse.gemm.weight_gradient import WeightGradient
from semisparse.kernels.compiled import CompiledLaunch
from semisparse.native.foreign import functions
from semisparse.native.interface import Interface
from semisparse.native.structures import (
    DTYPE_CODES,
    MOST_PARAMETERS,
    LaunchFacts,
    LaunchKind,
    ProductFacts,
    ProductKind,
)

if TYPE_CHECKING:
    from semisparse.kernels.launcher import Launcher

logger = logging.getLogger(__name__)

# Compiled kernels that C++ starts; they live as long as the process.
_KEPT: dict[int, object] = {}


@cache
def _connected() -> Interface | None:
    """The native library with its foreign functions; None, once and for all, where it cannot have them."""
    library = native.library() if native.registered() else None
    if library is None:
        return None
    try:
        library.connect(functions(*addresses("cusparseLtMatmul", "cusparseLtMatmulDescSetAttribute")))
    except (OSError, AttributeError) as error:
        logger.warning("launches go through Python: %s", error)
        return None
    return library


def launch(
    kind: LaunchKind,
    launcher: "Launcher",
    pointers: tuple[Tensor | None, ...],
    *,
    dtypes: tuple[torch.dtype | None, torch.dtype | None],
    sizes: tuple[int, int, int],
    mask: str = "",
    given: tuple[bool, bool] = (False, False),
    sizes_in_bytes: tuple[int, int] = (0, 0),
    behind: tuple[int, int] = (0, 0),
) -> None:
    """Hand over a kernel that was just launched.

    Args:
        kind: Which kernel.
        launcher: What launched it.
        pointers: As it was launched with.
        dtypes: Read and written.
        sizes: Rows, columns and entries from row to row, as the op's call has them.
        mask: As the op's call names it.
        given: As Interface.add_launch's.
        sizes_in_bytes: Of the buffers that the native op allocates; for unpack, of the buffer that it reads.
        behind: Bytes at the end of each of these buffers that the kernel does not write, and the op pads.
    """
    library, index = _connected(), next(pointer for pointer in pointers if pointer is not None).get_device()
    if library is None or index < 0:
        return
    found = launcher.compiled(index, *pointers)
    if not isinstance(found, CompiledLaunch) or len(found.parameters) > MOST_PARAMETERS:
        logger.debug("%s goes through Python: %s", kind.name, found)
        return
    facts = LaunchFacts(function=found.function, threads=found.threads, shared_bytes=found.shared_bytes)
    facts.grid[:], facts.bytes[:], facts.behind[:] = found.grid, sizes_in_bytes, behind
    facts.parameter_count = len(found.parameters)
    for number, (source, value) in enumerate(found.parameters):
        facts.source[number], facts.value[number] = source, value
    _KEPT[found.function] = found.kernel
    read, written = (0 if dtype is None else DTYPE_CODES[dtype] for dtype in dtypes)
    library.add_launch(kind, index, (read, written), mask, sizes, given, facts)


def product(
    kind: ProductKind, asked: Problem, index: int, sizes: tuple[int, int, int], choice: Choice | None, backend: Backend
) -> None:
    """Hand over a product that was just started in this thread: its plan, or that it is masked dense.

    Args:
        kind: Which product.
        asked: Its problem.
        index: Of the CUDA device.
        sizes: Tokens (before padding), out_features and in_features of the op's call.
        choice: What dispatch.multiply followed.
        backend: As the call names it.
    """
    library = _connected()
    if library is None or (choice is not None and autotuner().known(asked, index) is not choice):
        return  # tuning may still replace the choice
    facts = ProductFacts(a_rows=asked.rows, a_columns=asked.reduction)
    facts.b_rows, facts.b_columns = asked.b_shape
    facts.d_rows, facts.d_columns = asked.d_shape
    facts.b_transposed, facts.d_transposed = asked.b_order == "column", asked.d_order == "column"
    algorithm = None
    if choice is not None:
        algorithm = choice.algorithm if backend == "auto" else choice.sparse_algorithm
    if algorithm is not None:
        if choice is not None and choice.chunk is not None and can_be_cut(asked, choice.chunk):
            return  # one plan would compute the whole product
        if not _add_plan(library, facts, asked, algorithm, index):
            return
    library.add_product(kind, index, DTYPE_CODES[asked.out_dtype], sizes, asked.bias, backend, facts)


def way(gradient: WeightGradient, index: int, choice: Choice) -> None:
    """Hand over which way leads to a weight gradient with backend "auto".

    Args:
        gradient: What was computed.
        index: Of the CUDA device.
        choice: What was followed.
    """
    library = _connected()
    if library is None or autotuner().known(gradient, index) is not choice:
        return  # as in product
    kind = ProductKind.WHOLE_WAY if choice.algorithm is None else ProductKind.SAMPLED_WAY
    dtypes = DTYPE_CODES[gradient.out_dtype] | DTYPE_CODES[gradient.dtype] << 8
    sizes = gradient.tokens, gradient.out_features, gradient.in_features
    library.add_product(kind, index, dtypes, sizes, gradient.bias, "auto", ProductFacts())


def _add_plan(library: Interface, facts: ProductFacts, asked: Problem, algorithm: int, index: int) -> bool:
    """Write the plan of a product into facts; whether there is one that C++ can start."""
    prepared = engine().prepared(asked, algorithm, index) if library.multiplies else None
    if prepared is None:
        return False
    handle, plan, follows = prepared
    facts.handle, facts.plan, facts.descriptor = handle.handle, plan.address, plan.descriptor
    facts.bias = addressof(plan.bias) if asked.bias else None
    facts.uses, facts.last_use = addressof(plan.uses), addressof(plan.last_use)
    facts.packed_bytes, facts.workspace, facts.bias_follows = plan.packed_bytes, plan.workspace, follows
    if not plan.handed_over:
        address = plan.address
        plan.before_freeing(lambda: library.drop_plan(address))
    return True


def repeatable(matrix: Tensor) -> bool:
    """Whether a kernel reads matrix itself, and not a copy that was made for it."""
    aligned = not (matrix.data_ptr() % ALIGNMENT or matrix.stride(0) * matrix.itemsize % ALIGNMENT)
    return matrix.stride(1) == 1 and aligned
