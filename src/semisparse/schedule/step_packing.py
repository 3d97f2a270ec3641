"""Packing the weights of a model once per optimizer step, where a schedule is told to."""

from typing import Any, Literal, get_args

from semisparse.errors import ConfigError
from semisparse.nn import PackedWeights
from semisparse.schedule.scheduled_layers import ScheduledLayers

Pack = Literal["each_forward", "per_step"]


def checked_pack(pack: Any) -> Pack:
    """pack, if it says when to pack.

    Raises:
        ConfigError: It does not.
    """
    if pack not in get_args(Pack):
        raise ConfigError(f"pack={pack!r} is not one of {', '.join(map(repr, get_args(Pack)))}")
    checked: Pack = pack
    return checked


class StepPacking:
    """Packs when a schedule says so; with pack="each_forward" its methods do nothing.

    As long as it is unknown whether the layers are called, they pack at each forward: that is how compiled calls are
    seen.

    Args:
        layers: The layers of the schedule.
        pack: When to pack.

    Attributes:
        weights: The packed weights; None with pack="each_forward".
    """

    def __init__(self, layers: ScheduledLayers, pack: Pack) -> None:
        self._layers = layers
        self.weights = PackedWeights(layers.model) if pack == "per_step" else None

    def pack(self, *, everything: bool = False) -> None:
        """Pack what an optimizer step may have changed; arguments as PackedWeights.pack."""
        if self.weights is not None:
            self.weights.ready = not self._layers.awaits_calls
            self.weights.pack(everything=everything)

    def pack_changed(self) -> None:
        """Pack what shows a change."""
        if self.weights is not None:
            self.weights.ready = not self._layers.awaits_calls
            self.weights.pack_changed()

    def close(self) -> None:
        """Pack at each forward from now on."""
        if self.weights is not None:
            self.weights.close()
            self.weights = None
