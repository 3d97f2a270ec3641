"""How C++ asks Python, and how Python's exceptions come back through C++ with their type.

The stable ABI carries no exceptions. An op that C++ calls therefore returns a message, a tensor of bytes that is empty
for success, and keeps the exception itself for the calling thread. C++ raises a RuntimeError with the message, and the
caller in Python raises the kept exception in its place. Compiled code, which has no such caller, raises the
RuntimeError.
"""

import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor

_failed = threading.local()


def in_python(
    implementation: Callable[..., Any], results: int, texts: Sequence[int] = ()
) -> Callable[..., Tensor | tuple[Tensor, ...]]:
    """implementation, in the form that C++ calls.

    Args:
        implementation: Computes an op.
        results: How many tensors it returns; 0 for None.
        texts: Places of the strings among the arguments, which C++ hands over as bytes (csrc/text.h says why).

    Returns:
        A function of the same arguments that never raises. It returns the tensors and a message, which is empty unless
        implementation raised; the message alone where there are no tensors.
    """

    @wraps(implementation)
    def call(*args: Any) -> Tensor | tuple[Tensor, ...]:
        handled = sys.exception()
        try:
            given = [bytes(arg.tolist()).decode() if place in texts else arg for place, arg in enumerate(args)]
            found: Tensor | tuple[Tensor, ...] | None = implementation(*given)
        except BaseException as error:
            message = f"{type(error).__name__}: {error}"
            _clear_frames(error, handled)  # they hold tensors, for as long as nothing takes the error
            _failed.kept = message, error
            nothing = [torch.empty(0) for _ in range(results)]
            said = torch.frombuffer(bytearray(message.encode()), dtype=torch.uint8)
            return (*nothing, said) if results else said
        fine = torch.empty(0, dtype=torch.uint8)
        if found is None:
            return fine
        return (found, fine) if isinstance(found, Tensor) else (*found, fine)

    return call


def _clear_frames(error: BaseException, handled: BaseException | None) -> None:
    """Clear the frames of error and of what it came from, but not of what its caller was handling before."""
    seen = {id(handled)}
    left: list[BaseException | None] = [error]
    while left:
        one = left.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            traceback.clear_frames(one.__traceback__)
            left += one.__cause__, one.__context__


def typed(raised: RuntimeError) -> BaseException:
    """The exception behind one that C++ raised; raised itself where there is none."""
    message, error = _failed.__dict__.pop("kept", (None, None))
    if error is None or not str(raised).startswith(message):
        return raised
    return error
