"""Triton's interpreter without the work that it repeats; what kernels compute in it stays the same."""

from collections.abc import Callable

import triton
from triton import language
from triton.language import core
from triton.runtime import interpreter

VERSION = "3.6.0"
"""The Triton whose internals these functions replace; another one interprets as it is, in twice the time."""

_patched: set[tuple[bool, bool]] = set()
"""Which of triton.language and its core were visible to functions for which the language was patched in this launch."""


def speed_up() -> None:
    """Halve the time of interpreted kernels. Repeated calls change nothing more."""
    if triton.__version__ == VERSION and interpreter._patch_lang.__module__ == interpreter.__name__:
        patch_once_per_launch()
        name_types_when_asked()


def patch_once_per_launch() -> None:
    """Patch the language for the first of a launch's calls that sees it, not for each call of a device function again.

    Triton never undoes the patches of a device function's call, so each call replaces patches by the same.
    """
    original: Callable[..., interpreter._LangPatchScope] = interpreter._patch_lang

    def patch(function: Callable[..., object]) -> interpreter._LangPatchScope:
        visible = function.__globals__.values()
        key = any(value is language for value in visible), any(value is core for value in visible)
        if key in _patched:
            return interpreter._LangPatchScope()
        scope = original(function)
        _patched.add(key)
        restore = scope.restore

        def end() -> None:
            _patched.clear()
            restore()

        scope.restore = end  # called at the end of a launch
        return scope

    interpreter._patch_lang = patch


def name_types_when_asked() -> None:
    """Make the names of tuples' types where they are read: every value has one, and few are ever read."""

    def made(self: core.tuple_type, types: list[core.base_type], fields: list[str] | None = None) -> None:
        self.types = types
        self.fields = fields or [""] * len(types)

    def name(self: core.tuple_type) -> str:
        return "[" + ",".join(f"{field}:{kind}" for field, kind in zip(self.fields, self.types, strict=True)) + "]"

    core.tuple_type.__init__ = made
    core.tuple_type.name = property(name)
