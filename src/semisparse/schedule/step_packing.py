"""Packing the weights of a model once per optimizer step, where a schedule is told to."""

from typing import Literal

from semisparse.arguments import check_choice
from semisparse.errors import ConfigError
from semisparse.nn import PackedWeights
from semisparse.nn.pack_together import Keep
from semisparse.schedule.scheduled_layers import ScheduledLayers

Pack = Literal["each_forward", "per_step"]


class StepPacking:
    """Packs when a schedule says so; with pack="each_forward" its methods do nothing.

    As long as it is unknown whether the layers are called, they pack at each forward: that is how compiled calls are
    seen.

    Args:
        layers: The layers of the schedule.
        pack: When to pack.
        keep: As PackedWeights'.

    Attributes:
        weights: The packed weights; None with pack="each_forward".

    Raises:
        ConfigError: pack or keep is not one of its values, or keep is given where nothing is kept.
    """

    def __init__(self, layers: ScheduledLayers, pack: Pack, keep: Keep) -> None:
        check_choice("pack", pack, Pack)
        check_choice("keep", keep, Keep)
        if pack == "each_forward" and keep != "both":
            raise ConfigError(f"keep={keep!r} needs pack='per_step': with pack={pack!r} no packed weight is kept")
        self._layers = layers
        self.weights = PackedWeights(layers.model, keep=keep) if pack == "per_step" else None

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
