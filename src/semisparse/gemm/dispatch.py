"""One call for one product: the sparse engine with the algorithm that was chosen, or masked dense where that won."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

from torch import Tensor

from semisparse.errors import ConfigError, EngineError
from semisparse.gemm import dense
from semisparse.gemm.choice import Choice
from semisparse.gemm.engine import Engine, engine
from semisparse.gemm.problem import Problem
from semisparse.gemm.trial import MEMORY, Operands
from semisparse.gemm.tuner import Tuner, tuner

Mode = Literal["auto", "cusparselt", "dense"]
Observer = Callable[[Problem, int | None, Choice | None], None]
"""Called after each product with its problem, the algorithm that ran (None: masked dense) and the choice followed."""

_observers: list[Observer] = []


@contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """Tell observer of every product that is started inside the block, on any thread."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


def multiply(
    problem: Problem,
    packed: Tensor,
    b: Tensor,
    out: Tensor,
    bias: Tensor | None = None,
    *,
    unpack: Callable[[Tensor], Tensor],
    mode: Mode = "auto",
    sparse: Engine | None = None,
    chooser: Tuner | None = None,
) -> Choice | None:
    """out = A B (+ bias) on the current stream; returns the choice that was followed, None for mode "dense".

    packed, b, out, bias: as Engine.matmul takes them. unpack: packed -> the full pruned A (rows x reduction), for the
    masked-dense product. mode: "auto" follows the tuner, "cusparselt" always runs the fastest right algorithm, "dense"
    always unpacks. sparse, chooser: the process's engine and tuner unless given.

    An A of more than 256 MiB is not unpacked to be timed: unpacking alone then moves so many bytes that the sparse
    product is taken to be faster.

    Raises what Engine.matmul and Tuner.choose raise; EngineError for mode "cusparselt" where no algorithm is right.
    """
    if mode == "dense":
        dense.product(problem, unpack(packed), b, out, bias)
        _tell(problem, None, None)
        return None
    if mode not in ("auto", "cusparselt"):
        raise ConfigError(f"mode={mode!r} is not one of 'auto', 'cusparselt', 'dense'")
    index, chooser = out.get_device(), chooser or tuner()
    choice = chooser.known(problem, index)
    if choice is None:
        too_large = problem.rows * problem.reduction * problem.dtype.itemsize > MEMORY

        def unpack_and_multiply() -> None:
            dense.product(problem, unpack(packed), b, out, bias)

        operands = Operands(packed, b, out, bias, None if too_large else unpack_and_multiply)
        choice = chooser.choose(problem, index, operands)
    algorithm = choice.algorithm if mode == "auto" else choice.sparse_algorithm
    if algorithm is not None:
        used = sparse or engine()
        used.matmul(problem, algorithm, packed, b, out, bias)
        used.products += 1
    elif mode == "auto":
        dense.product(problem, unpack(packed), b, out, bias)
    else:
        reasons = "; ".join(f"{number}: {reason}" for number, reason in choice.rejected) or choice.note
        raise EngineError(f"no sparse algorithm is right for {problem} ({reasons}); use engine='auto' or 'dense'")
    _tell(problem, algorithm, choice)
    return choice


def _tell(problem: Problem, algorithm: int | None, choice: Choice | None) -> None:
    for observer in _observers:
        observer(problem, algorithm, choice)
