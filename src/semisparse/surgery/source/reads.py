"""Whether a module above a layer reads the layer's weight itself, and whether the layer is called at all."""

from dataclasses import dataclass

from torch import nn

from semisparse.surgery.selection import WRAPPERS, FoundLayer
from semisparse.surgery.source.class_uses import uses_of
from semisparse.surgery.source.walk import ANY, Uses

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True, slots=True)
class Reading:
    """A place that reads a layer's weight itself.

    Attributes:
        place: The method and its line.
        called: Whether some place also calls the layer.
    """

    place: str
    called: bool


def reading_of(found: FoundLayer, known: dict[type, Uses]) -> Reading | None:
    """Where the source of the modules above a layer reads the layer's weight, or None.

    Args:
        found: The layer.
        known: What was found for each class so far, see uses_of; pass one dict for all layers of a model.
    """
    parts = tuple(found.name.split("."))
    place, called = None, False
    for depth, module in enumerate(found.above, start=1):
        path = parts[len(parts) - depth :]
        if isinstance(module, _CONTAINERS) and type(module).__module__.startswith("torch.nn"):
            continue
        uses = uses_of(module, known)
        bare = tuple(part for part in path if part not in WRAPPERS)  # wrappers forward attribute access
        place = place or uses.reads.get(bare)
        called = called or bare in uses.calls or _calls(uses, path, found)
    return None if place is None else Reading(place, called)


def _calls(uses: Uses, path: tuple[str, ...], found: FoundLayer) -> bool:
    """Whether the layer at path is called: itself, or through containers that call what they hold."""
    for length in range(len(path), 0, -1):
        between = found.above[: len(path) - length]  # from the layer's parent up to the module that is called
        if not all(isinstance(module, _CONTAINERS) for module in between):
            return False
        if path[:length] in uses.calls or (length == 1 and ANY in uses.calls):
            return True
    return False
