"""Copies of layers, remembered while they live, so that a schedule can see the copies nobody switches."""

from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, WeakSet, ref

from torch import nn

# Layer -> its living copies, those of its copies among them.
_COPIES: WeakKeyDictionary[nn.Module, WeakSet[nn.Module]] = WeakKeyDictionary()
# Copy -> the layers that it stems from.
_ORIGINS: WeakKeyDictionary[nn.Module, tuple[ReferenceType[nn.Module], ...]] = WeakKeyDictionary()


class Origin:
    """What a layer's state carries to a copy made in this process: where it was copied from. Pickles to nothing."""

    __slots__ = ("_layers",)

    def __init__(self, layer: nn.Module | None = None) -> None:
        self._layers = () if layer is None else (ref(layer), *_ORIGINS.get(layer, ()))

    def note(self, copy: nn.Module) -> None:
        """Remember copy with those of its origins that still live."""
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
    """The living copies of layer, and those of its copies."""
    return list(_COPIES.get(layer, ()))
