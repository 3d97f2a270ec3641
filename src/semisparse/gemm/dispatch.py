"""One call per product: the sparse engine with the chosen algorithm, whole or in chunks, or masked dense."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

from semisparse import native
from semisparse.config import BACKENDS, Backend
from semisparse.errors import ConfigError, EngineError
from semisparse.gemm import dense
from semisparse.gemm.autotune.algorithm import Choice
from semisparse.gemm.autotune.autotuner import Autotuner, autotuner
from semisparse.gemm.autotune.candidates import MEMORY
from semisparse.gemm.chunks import pieces
from semisparse.gemm.engine import Engine
from semisparse.gemm.engine import engine as process_engine
from semisparse.gemm.operands import Operands
from semisparse.gemm.problem import Problem
from semisparse.gemm.weight_gradient import WeightGradient

Observer = Callable[[Problem | WeightGradient, int | None, Choice | None], None]
"""Called after each product with its problem, the algorithm that ran (None: masked dense) and the choice followed.

A weight gradient that was chosen not to be sampled is told with its description, None and the choice.
"""

_observers: list[Observer] = []
_timing = threading.local()


@contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """Call observer for every product that is started inside the block, on any thread."""
    _observers.append(observer)
    native.watch(1)  # products that C++ starts are not seen here
    try:
        yield
    finally:
        native.watch(-1)
        _observers.remove(observer)


def multiply(
    problem: Problem,
    operands: Operands,
    unpack: Callable[[Tensor], Tensor],
    backend: Backend = "auto",
    *,
    engine: Engine | None = None,
    tuner: Autotuner | None = None,
) -> Choice | None:
    """D = A B (+ bias) on the current stream.

    An A of more than 256 MiB is not unpacked to be timed: unpacking alone then moves so many bytes that the sparse
    product is taken to be faster. Where the choice says so, a product of many tokens runs in chunks of them: each piece
    is a product of its own, with its bits.

    Args:
        problem: The product.
        operands: Its tensors; out is written.
        unpack: The packed buffer -> the full pruned A (rows x reduction), for the masked-dense product.
        backend: "auto" follows the autotuner, "cusparselt" always runs the fastest right algorithm, "dense" always
            unpacks.
        engine: Default: the process's engine.
        tuner: Default: the process's autotuner.

    Returns:
        The choice that was followed; None for backend "dense".

    Raises:
        ConfigError: The backend is unknown.
        EngineError: With backend "cusparselt", where no algorithm is right; else as Engine.matmul and Autotuner.choose.
        TensorError, ShapeError: An operand does not fit.
    """
    if backend == "dense":
        dense.product(problem, unpack(operands.packed), operands)
        algorithm, choice = None, None
    else:
        if backend not in BACKENDS:
            raise ConfigError(f"backend={backend!r} is not one of {', '.join(map(repr, BACKENDS))}")
        tuner, index = tuner or autotuner(), operands.out.get_device()
        choice = tuner.known(problem, index) or _chosen(problem, operands, unpack, tuner)
        algorithm = choice.algorithm if backend == "auto" else choice.sparse_algorithm
        if algorithm is not None:
            engine = engine or process_engine()
            if choice.chunk is None:
                engine.matmul(problem, algorithm, operands)
                engine.python_products += 1
            else:
                for part, given in pieces(problem, operands, choice.chunk):
                    engine.matmul(part, algorithm, given)
                    engine.python_products += 1
        elif backend == "auto":
            dense.product(problem, unpack(operands.packed), operands)
        else:
            reasons = "; ".join(f"{number}: {reason}" for number, reason in choice.rejected) or choice.note
            raise EngineError(
                f"no sparse algorithm is right for {problem} ({reasons}); use backend='auto' or backend='dense'"
            )
    if _observers:
        tell(problem, algorithm, choice)
    return choice


def samples(
    gradient: WeightGradient,
    index: int,
    sampled: Callable[[], object],
    whole: Callable[[], object],
    *,
    tuner: Autotuner | None = None,
) -> Choice:
    """Which way leads to a weight gradient, measured at the first call. Observers hear of it where it is not sampled.

    Args:
        gradient: What is computed.
        index: Of the device.
        sampled: Computes it from a sample; called to be timed.
        whole: The same from all of dy.
        tuner: Default: the process's autotuner.

    Returns:
        The choice; its algorithm is None where dy is not sampled.

    Raises:
        EngineError, ConfigError: As Autotuner.choose_way.
    """
    tuner = tuner or autotuner()
    choice = tuner.known(gradient, index)
    if choice is None:
        _timing.quiet = True  # products that are timed did not run for the caller
        try:
            choice = tuner.choose_way(gradient, index, sampled, whole)
        finally:
            _timing.quiet = False
    if _observers and choice.algorithm is None:
        tell(gradient, None, choice)
    return choice


def tell(problem: Problem | WeightGradient, algorithm: int | None, choice: Choice | None) -> None:
    """Call the observers for a product that was started."""
    if getattr(_timing, "quiet", False):
        return
    for observer in _observers:
        observer(problem, algorithm, choice)


def _chosen(problem: Problem, operands: Operands, unpack: Callable[[Tensor], Tensor], tuner: Autotuner) -> Choice:
    """The autotuner's choice for a problem that it does not know yet."""

    def unpack_and_multiply(asked: Problem, given: Operands) -> None:
        dense.product(asked, unpack(given.packed), given)

    too_large = problem.rows * problem.reduction * problem.dtype.itemsize > MEMORY
    index = operands.out.get_device()
    return tuner.choose(problem, index, operands, None if too_large else unpack_and_multiply)
