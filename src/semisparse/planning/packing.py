"""When the weights of a planned model are packed, and how many micro-batches one packing serves."""

from dataclasses import dataclass

from semisparse.arguments import check_choice
from semisparse.errors import ConfigError
from semisparse.schedule.step_packing import Pack


@dataclass(frozen=True, slots=True)
class Packing:
    """How a training step packs and accumulates.

    Attributes:
        pack: As SparseSchedule's: "each_forward", or "per_step", all weights together after each optimizer step.
        accumulation: Micro-batches per optimizer step, each with a forward and a backward.

    Raises:
        ConfigError: pack is not among its choices, or accumulation is not a positive integer.
    """

    pack: Pack = "each_forward"
    accumulation: int = 1

    def __post_init__(self) -> None:
        check_choice("pack", self.pack, Pack)
        if type(self.accumulation) is not int or self.accumulation < 1:
            raise ConfigError(
                f"accumulation={self.accumulation!r} must be a positive number of micro-batches per optimizer step"
            )

    @property
    def per_step(self) -> bool:
        """Whether weights are packed once per step."""
        return self.pack == "per_step"

    def __str__(self) -> str:
        when = "once per step, all together" if self.per_step else "at each forward"
        batches = "" if self.accumulation == 1 else f"; {self.accumulation} micro-batches per step"
        return f"Weights are packed {when}{batches}."


EACH_FORWARD = Packing()
"""What a plan assumes unless it is told."""
