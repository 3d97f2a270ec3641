"""Searching the source of a module's class for places that use a child's weight instead of calling the child.

A swapped child that is never called would multiply dense without notice. What a class does with `self.<child>` is in
its source: its own methods and those of its bases, in Python's order of resolution, except constructors and
initialisers. Aliases across methods, lists and helper functions cannot be seen this way; a schedule's first step and
semisparse.check detect those.
"""

import ast
import functools
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from semisparse.surgery.source.walk import Reader, Uses

# Methods that construct a model, save it or show it: they read weights without computing with them.
_SETTING_UP = re.compile(
    r"^_*(init|initiali[sz]e|reset|tie|untie|load|save|setup|extra_repr|repr|str|new|setstate|getstate|post_init)(_|$)"
)


def uses_of(module: nn.Module, known: dict[type, Uses]) -> Uses:
    """What the module's class does with the modules below it, and a forward that was set on the instance.

    Args:
        module: The module.
        known: What was found for each class in this call of the library. Not kept longer: methods can be replaced.
    """
    cls, own = type(module), vars(module).get("forward")
    if cls not in known:
        known[cls] = Uses()
        for function, sets_up in _methods(cls):
            _look(function, known[cls], sets_up)
    if own is None:
        return known[cls]
    both = Uses(dict(known[cls].reads), set(known[cls].calls))
    for function in _functions(own):
        _look(function, both)
    return both


_ASKS_BASE = re.compile(r"super\(|\.\w+\(self\b")  # super().forward(x), or Base.forward(self, x)


def _methods(cls: type) -> Iterator[tuple[Callable[..., Any], bool]]:
    """The functions that Python would run for this class, and whether each only constructs, saves or shows.

    The first of each name in the order of resolution, and those that it reaches by super() or by a base's name.
    """
    going_on: dict[str, bool] = {}
    for base in cls.__mro__:
        if base in (nn.Module, object):
            continue
        for name, value in vars(base).items():
            if not going_on.get(name, True):
                continue
            functions = list(_functions(value))
            if functions:
                going_on[name] = any(_ASKS_BASE.search(_source(function) or "super(") for function in functions)
                yield from ((function, bool(_SETTING_UP.match(name))) for function in functions)


def _functions(value: Any) -> Iterator[Callable[..., Any]]:
    """The plain functions inside a method, property, partial or decorator."""
    if isinstance(value, (staticmethod, classmethod)):
        value = value.__func__
    if isinstance(value, property):
        for part in (value.fget, value.fset):
            yield from _functions(part)
        return
    if isinstance(value, functools.partial):
        value = value.func
    if isinstance(value, functools.partialmethod):
        value = value.func
    value = getattr(value, "__func__", value)
    if not inspect.isfunction(value):
        return
    unwrapped = inspect.unwrap(value)
    if inspect.isfunction(unwrapped):  # torch.compile's forward of an nn.Sequential wraps a module
        value = unwrapped
    yield value
    for cell in value.__closure__ or ():  # a decorator without functools.wraps holds the method it wraps
        try:
            inner = cell.cell_contents
        except ValueError:
            continue
        if inspect.isfunction(inner) and inner is not value:
            yield inspect.unwrap(inner)


@functools.lru_cache(4096)
def _source(function: Callable[..., Any]) -> str | None:
    try:
        return textwrap.dedent(inspect.getsource(function))
    except (OSError, TypeError):
        return None


def _look(function: Callable[..., Any], uses: Uses, sets_up: bool = False) -> None:
    """Add what function does. A constructor reads weights harmlessly, but may keep a module in a list."""
    text = _source(function)
    if text is None:
        return
    try:
        tree = ast.parse(text)
    except SyntaxError:  # a lambda inside an expression, say
        return
    line = function.__code__.co_firstlineno
    found = Uses()
    # A decorator's wrapper calls a function of its closure, which is read by itself (see _functions).
    inner = frozenset(function.__code__.co_freevars)
    Reader(found, f"{function.__module__}.{function.__qualname__}", line, sets_up, inner).read(tree)
    uses.calls |= found.calls
    if not sets_up:
        uses.reads.update({path: place for path, place in found.reads.items() if path not in uses.reads})
