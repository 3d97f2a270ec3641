"""Layers whose weight somebody else reads, so that swapping them would silently do nothing.

Two ways to know: the source of the modules above (source_reads.py), and a list by name for what has no readable source
or reads by a flag that can be asked. Checked by name for packages that need not be installed. Sources of the list:
torch.nn.TransformerEncoderLayer's fast path, torch.nn.MultiheadAttention, xFormers' SwiGLU, and timm's attention blocks
that call F.linear on qkv.weight.
"""

from dataclasses import dataclass

from torch import nn

from semisparse.surgery.selection import WRAPPERS, FoundLayer
from semisparse.surgery.source_reads import uses_of
from semisparse.surgery.source_walk import ANY, Uses

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True, slots=True)
class Reading:
    """A place that reads a layer's weight itself. called: whether some place calls the layer, too."""

    place: str
    called: bool


def reading_of(found: FoundLayer, known: dict[type, Uses]) -> Reading | None:
    """Who reads the weight of this layer in the source of the modules above it, or None.

    known: see uses_of; pass the same dict for all layers of one model.
    """
    parts = tuple(found.name.split("."))
    place, called = None, False
    for depth, module in enumerate(found.above, start=1):
        path = parts[len(parts) - depth :]
        if isinstance(module, _CONTAINERS) and type(module).__module__.startswith("torch.nn"):
            continue
        uses = uses_of(module, known)
        bare = tuple(part for part in path if part not in WRAPPERS)  # wrappers pass attributes on
        place = place or uses.reads.get(bare)
        called = called or bare in uses.calls or _calls(uses, path, found)
    return None if place is None else Reading(place, called)


def _calls(uses: Uses, path: tuple[str, ...], found: FoundLayer) -> bool:
    """Whether the layer at path is called: itself, or through containers that call what they hold."""
    for length in range(len(path), 0, -1):
        between = found.above[: len(path) - length]  # from the layer's holder up to the module called
        if not all(isinstance(module, _CONTAINERS) for module in between):
            return False
        if path[:length] in uses.calls or (length == 1 and ANY in uses.calls):
            return True
    return False


def bypass_reason(parent: nn.Module | None, child: str) -> str | None:
    """Why the layer held as parent.child would be bypassed, or None when it is called like any module."""
    if parent is None:
        return None
    if isinstance(parent, nn.MultiheadAttention):
        return "nn.MultiheadAttention reads out_proj.weight and never calls the layer"
    if isinstance(parent, nn.TransformerEncoderLayer):
        return (
            "nn.TransformerEncoderLayer's fast path in eval reads its weights and never calls the layer: use a block "
            "that calls its linears"
        )
    ancestry = {(cls.__module__.partition(".")[0], cls.__name__) for cls in type(parent).__mro__}
    if ("xformers", "SwiGLU") in ancestry:
        return "xFormers' SwiGLU reads its weights and never calls the layer: set XFORMERS_DISABLED=1"
    in_timm = any(package == "timm" for package, _ in ancestry)
    if in_timm and child == "qkv" and getattr(parent, "q_bias", None) is not None:
        return f"timm's {type(parent).__name__} with separate q and v biases reads qkv.weight and never calls the layer"
    return None
