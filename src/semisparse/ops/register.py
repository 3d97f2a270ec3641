"""One call registers an op: schema, fake, CPU and CUDA implementations, and how eager calls reach them.

Ops are defined with Library.define and Library.impl, which costs a quarter of a custom_op per call. But for rescale_
they are functional: they never write to or alias an input. Gradients are not defined here; autograd.py has the only
formulas.

The hot ops, which every training step calls for every layer, have C++ implementations on CUDA (csrc/). Where the native
library is loaded, C++ alone implements their CUDA key, and what it has not seen yet it asks of the Python
implementation, registered as an op of its own with the suffix _in_python. Without the library Python implements the
CUDA key, and eager calls on plain CUDA tensors skip the dispatcher.
"""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, Literal, ParamSpec, TypeVar

import torch
from torch import Tensor

from semisparse import native

P = ParamSpec("P")
R = TypeVar("R")

LIBRARY = torch.library.Library("semisparse", "FRAGMENT")
"""Holds every op for the life of the process."""

CUDA_SIDE: Literal["python", "native"] = "native" if native.registered() else "python"
"""Who implements the CUDA key of the hot ops. Decided here, before the first of them is registered."""

_EAGER_DEVICE = "cuda"
_PLAIN = frozenset({Tensor, torch.nn.Parameter})


def register(
    schema: str,
    *,
    fake: Callable[..., Any],
    cuda: Callable[..., Any] | None = None,
    every_device: bool = False,
    hot: bool = False,
    differentiable: bool = False,
    note: Callable[[Tensor], None] | None = None,
    vmap: Callable[..., Any] | None = None,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Register the decorated function as the CPU implementation of a new op, and return the function that calls the op.

    Inside the CPU implementation autocast is off, since dtypes are arguments of the ops, and autograd does not look.

    Args:
        schema: As torch.library takes it, without the namespace.
        fake: Shapes and dtypes of the results, for fake and meta tensors.
        cuda: The implementation on CUDA.
        every_device: Whether the decorated function serves every device that has no implementation of its own.
        hot: Whether C++ implements the op on CUDA where it can.
        differentiable: Whether autograd.py registers a formula. Other ops let autograd pass by without a trace, rather
            than with torch's default of a warning and a wrong gradient.
        note: Called with the first argument of every call that goes through the dispatcher.
        vmap: The op's rule for torch.func.vmap, as torch.library.register_vmap takes it.
    """
    name = schema.partition("(")[0]

    def decorate(cpu: Callable[P, R]) -> Callable[P, R]:
        LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        everywhere = "CompositeExplicitAutograd" if every_device else "CPU"
        LIBRARY.impl(name, _noting(note, _guarded(cpu)), everywhere)
        natively = hot and CUDA_SIDE == "native"
        if cuda is not None and natively:
            _register_fallback(schema, _noting(note, cuda))
        elif cuda is not None:
            LIBRARY.impl(name, _noting(note, cuda), "CUDA")
        if not differentiable:
            LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")
        torch.library.register_fake(f"semisparse::{name}", fake, lib=LIBRARY)
        if vmap is not None:
            torch.library.register_vmap(f"semisparse::{name}", vmap, lib=LIBRARY)
        overload = getattr(torch.ops.semisparse, name).default
        return _typed_caller(cpu, overload) if natively else _caller(cpu, overload, cuda if hot else None)

    return decorate


def _register_fallback(schema: str, implementation: Callable[..., Any]) -> None:
    """The op that C++ calls for what it cannot do itself."""
    signature, _, returned = schema.partition(" -> ")
    name, _, arguments = signature.replace("SymInt", "int").partition("(")
    results = [result for result in returned.strip("()").split(", ") if result]
    fallback = f"{name}_in_python"
    texts = [place for place, argument in enumerate(arguments.split(", ")) if argument.startswith("str ")]
    arguments = arguments.replace("str ", "Tensor ")
    LIBRARY.define(f"{fallback}({arguments} -> ({', '.join([*results, 'Tensor'])})")
    LIBRARY.impl(fallback, native.in_python(implementation, len(results), texts), "CompositeExplicitAutograd")
    LIBRARY.impl(fallback, torch.library.fallthrough_kernel, "Autograd")


def _typed_caller(cpu: Callable[P, R], overload: Any) -> Callable[P, R]:
    """Calls an op that C++ implements, and raises what the Python behind it raised."""
    direct = getattr(overload, "_op", overload)  # what the overload calls: a layer of Python less

    @wraps(cpu)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            return overload(*args, **kwargs)
        try:
            return direct(*args, **kwargs)
        except RuntimeError as error:
            failure = native.typed(error)
        try:
            raise failure  # here, where no other exception takes the place of what it came from
        finally:
            del failure  # its traceback holds this frame

    return call


def _caller(cpu: Callable[P, R], overload: Any, cuda: Callable[..., R] | None) -> Callable[P, R]:
    if cuda is None:

        @wraps(cpu)
        def through_dispatcher(*args: P.args, **kwargs: P.kwargs) -> R:
            return overload(*args, **kwargs)

        return through_dispatcher
    direct = cuda
    tensors = [at for at, argument in enumerate(overload._schema.arguments) if "Tensor" in str(argument.type)]

    @wraps(cpu)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if not kwargs and _direct(args, tensors):
            return direct(*args)
        return overload(*args, **kwargs)

    return call


def plain_calls() -> bool:
    """Whether calls are neither compiled, nor seen by a dispatch mode, nor transformed by functorch in this thread."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.maybe_current_level() is not None
    )


def _direct(args: Sequence[Any], tensors: Sequence[int]) -> bool:
    """Whether the dispatcher would only find the CUDA side: plain CUDA tensors, and nothing watches or traces.

    Compilers, dispatch modes (selective checkpointing, fake tensors), functorch transforms, tensor subclasses and
    calls that autograd has to see all go through the dispatcher.
    """
    if not plain_calls():
        return False
    recorded = torch.is_grad_enabled()
    given = len(args)
    for at in tensors:
        if at >= given or (tensor := args[at]) is None:
            continue
        if type(tensor) not in _PLAIN or tensor.device.type != _EAGER_DEVICE or (recorded and tensor.requires_grad):
            return False
    return True


def _noting(note: Callable[[Tensor], None] | None, implementation: Callable[..., R]) -> Callable[..., R]:
    if note is None:
        return implementation

    def call(matrix: Tensor, *args: Any) -> R:
        note(matrix)
        return implementation(matrix, *args)

    return call


def _guarded(implementation: Callable[..., R]) -> Callable[..., R]:
    """implementation below autograd, and with autocast off: torch.cat raises for fp16 operands under the other kind."""

    @wraps(implementation)
    def call(first: Tensor, *args: Any) -> R:
        device = first.device.type
        with torch._C._AutoDispatchBelowAutograd():
            if device == "meta" or not torch.is_autocast_enabled(device):
                return implementation(first, *args)
            with torch.autocast(device, enabled=False):
                return implementation(first, *args)

    return call
