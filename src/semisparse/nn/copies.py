"""Copies of layers, remembered while they live, so that a schedule can see the copies nobody switches."""

from typing import Any
from weakref import WeakKeyDictionary, WeakSet, ref

from torch import nn

_COPIES: WeakKeyDictionary[nn.Module, WeakSet[nn.Module]] = WeakKeyDictionary()


class Origin:
    """What a layer's state carries to a copy made in this process: where it was copied from. Pickles to nothing."""

    __slots__ = ("_layer",)

    def __init__(self, layer: nn.Module | None = None) -> None:
        self._layer = None if layer is None else ref(layer)

    def note(self, copy: nn.Module) -> None:
        """Remember copy, if its origin is still alive."""
        layer = None if self._layer is None else self._layer()
        if layer is not None and layer is not copy:
            _COPIES.setdefault(layer, WeakSet()).add(copy)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Origin":
        return self

    def __reduce__(self) -> tuple[type["Origin"], tuple[()]]:
        return Origin, ()


def copies_of(layer: nn.Module) -> list[nn.Module]:
    """The living copies of layer, and those of its copies."""
    found = []
    for copy in list(_COPIES.get(layer, ())):
        found += [copy, *copies_of(copy)]
    return found
