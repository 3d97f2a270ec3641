"""How layers are copied, pickled and replicated, and a registry of living copies.

A schedule uses the registry to find copies that no schedule switches.
"""

from typing import Any, ClassVar, Self, SupportsIndex
from weakref import ReferenceType, WeakKeyDictionary, WeakSet, ref

from torch import nn

from semisparse.nn.registry import rebuild

TRANSIENT = ("_packed", "_called", "_stands_for", "gathered_codes")
"""Attributes that belong to one object alone: copies and pickles are made without them."""

_ORIGIN = "_copied_from"

# Layer -> its living copies, including copies of its copies.
_COPIES: WeakKeyDictionary[nn.Module, WeakSet[nn.Module]] = WeakKeyDictionary()
# Copy -> the layers that it was copied from, directly or not.
_ORIGINS: WeakKeyDictionary[nn.Module, tuple[ReferenceType[nn.Module], ...]] = WeakKeyDictionary()


class Origin:
    """Part of a layer's state that tells a copy in this process which layers it was copied from.

    Pickles to an empty origin.

    Args:
        layer: The layer that is copied; None for an empty origin.
    """

    __slots__ = ("_layers",)

    def __init__(self, layer: nn.Module | None = None) -> None:
        self._layers = () if layer is None else (ref(layer), *_ORIGINS.get(layer, ()))

    def note(self, copy: nn.Module) -> None:
        """Register copy with those of its origins that still exist."""
        _ORIGINS[copy] = self._layers
        for reference in self._layers:
            layer = reference()
            if layer is not None and layer is not copy:
                _COPIES.setdefault(layer, WeakSet()).add(copy)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Origin":
        return self

    def __reduce__(self) -> tuple[type["Origin"], tuple[()]]:
        return Origin, ()


class CopyableLinear(nn.Linear):
    """nn.Linear whose copies are registered, and whose class may be one that pickle cannot import by name."""

    _dense_class: ClassVar[type[nn.Linear]] = nn.Linear
    # Set on a replica of DataParallel: the layer that it was made from.
    _stands_for: "CopyableLinear | None" = None

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in self.__dict__.items() if name not in TRANSIENT}
        return {**state, _ORIGIN: Origin(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        origin = state.get(_ORIGIN)
        super().__setstate__({name: value for name, value in state.items() if name != _ORIGIN})
        if isinstance(origin, Origin):
            origin.note(self)

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        base = vars(type(self)).get("_swapped_base")  # set by registry.swapped_class
        if base is None:
            return super().__reduce_ex__(protocol)
        return rebuild, (base, self._dense_class), self.__getstate__()

    def _replicate_for_data_parallel(self) -> Self:
        replica: Self = super()._replicate_for_data_parallel()
        for name in (*TRANSIENT, "held_seed"):  # the seed is on another device
            replica.__dict__.pop(name, None)
        replica.__dict__["_stands_for"] = self._stands_for or self  # not as a submodule
        return replica


def copies_of(layer: nn.Module) -> list[nn.Module]:
    """The living copies of layer, including copies of its copies."""
    return list(_COPIES.get(layer, ()))
