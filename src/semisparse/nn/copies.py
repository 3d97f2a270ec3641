"""Copies of layers, remembered while they live, so that a schedule finds copies that no schedule switches."""

from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, WeakSet, ref

from torch import nn

# Layer -> its living copies, including copies of its copies.
_COPIES: WeakKeyDictionary[nn.Module, WeakSet[nn.Module]] = WeakKeyDictionary()
# Copy -> the layers that it was copied from, directly or not.
_ORIGINS: WeakKeyDictionary[nn.Module, tuple[ReferenceType[nn.Module], ...]] = WeakKeyDictionary()


class Origin:
    """Part of a layer's state that tells a copy in this process what it was copied from. Pickles to nothing."""

    __slots__ = ("_layers",)

    def __init__(self, layer: nn.Module | None = None) -> None:
        self._layers = () if layer is None else (ref(layer), *_ORIGINS.get(layer, ()))

    def note(self, copy: nn.Module) -> None:
        """Remember copy for those of its origins that still live."""
        _ORIGINS[copy] = self._layers
        for reference in self._layers:
            layer = reference()
            if layer is not None and layer is not copy:
                _COPIES.setdefault(layer, WeakSet()).add(copy)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Origin":
        return self

    def __reduce__(self) -> tuple[type["Origin"], tuple[()]]:
        return Origin, ()


def copies_of(layer: nn.Module) -> list[nn.Module]:
    """The living copies of layer, including copies of its copies."""
    return list(_COPIES.get(layer, ()))
