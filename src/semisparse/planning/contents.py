"""What a plan holds: a row per layer, and the sums over them."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from semisparse.config import SparseConfig
from semisparse.planning.candidates import DENSE
from semisparse.planning.packing import EACH_FORWARD, Packing
from semisparse.planning.problems import LinearProblem
from semisparse.planning.timing import Mode, Times


@dataclass(frozen=True, slots=True)
class PlanRow:
    """One linear layer.

    Attributes:
        name: The layer's name; "" for the root.
        in_features: K.
        out_features: N.
        calls: Each distinct problem and how often a micro-batch computes it; a step without accumulation is one.
        choice: The chosen candidate's name, or "dense".
        config: Its settings; None for dense.
        times: Milliseconds and bytes per step by candidate, all calls together. Empty if it was not measured.
        shared: What it saves that another layer in fp8 rounds the same input; None if there is none.
        why: Why the layer stays dense; "" if it is swapped.
        dropped: Candidate -> why it was not measured, or its measurement not used.
    """

    name: str
    in_features: int
    out_features: int
    calls: tuple[tuple[LinearProblem, float], ...]
    choice: str
    config: SparseConfig | None
    times: dict[str, Times]
    shared: Times | None = None
    why: str = ""
    dropped: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class PlanContents:
    """The fields of a plan, as Plan describes them; what can be done with it is added there."""

    rows: tuple[PlanRow, ...]
    mode: Mode
    candidates: dict[str, SparseConfig]
    machine: dict[str, str]
    step: Times | None = None
    predicted_ms: float | None = None
    host_weight: float | None = None
    remarks: tuple[str, ...] = ()
    by_layers_ms: float | None = None
    packing: Packing = EACH_FORWARD

    @property
    def configs(self) -> dict[str, SparseConfig]:
        """Name -> settings of the layers that are worth swapping: the mapping that sparsify takes. May be empty."""
        return {row.name: row.config for row in self.rows if row.config is not None}

    @property
    def dense(self) -> dict[str, str]:
        """Name -> reason of the layers that stay dense."""
        return {row.name: row.why for row in self.rows if row.config is None}

    @property
    def saving_ms(self) -> float:
        """Milliseconds that a step saves: of the whole step if that is known, else of its linear layers."""
        if self.step is not None and self.predicted_ms is not None:
            return self.step.ms - self.predicted_ms
        return sum(self.saving_of(row) for row in self.rows)

    @property
    def extra_bytes(self) -> int:
        """What swapped layers keep for the backward beyond what dense ones do. Zero where that is not measured."""
        swapped = [row for row in self.rows if row.config is not None]
        return sum(row.times[row.choice].held_bytes - row.times[DENSE].held_bytes for row in swapped)

    def saving_of(self, row: PlanRow) -> float:
        """Milliseconds that a layer saves per step.

        Args:
            row: Of this plan.

        Returns:
            Device time if the step's times are known, else the time of the layer alone, as the mode runs it.
        """
        if row.config is None:
            return 0.0
        shared = 0.0 if row.shared is None else self.time_of(row.shared)
        return self.time_of(row.times[DENSE]) - self.time_of(row.times[row.choice]) + shared

    def time_of(self, times: Times) -> float:
        """The milliseconds that this plan compares.

        Args:
            times: Of a row.
        """
        return times.ms if self.host_weight is None else times.on_device

    def __iter__(self) -> Iterator[PlanRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)
