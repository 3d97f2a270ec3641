"""What a self-check found, as plain values: files.py writes and reads them, and the command prints them."""

from dataclasses import dataclass, field
from typing import Literal

from semisparse.gemm.autotune.algorithm import Choice
from semisparse.planning.problems import LinearProblem
from semisparse.planning.store import Measurement

Outcome = Literal["pass", "fail", "raised", "skipped"]
"""Of a check. "raised": it ended in an error instead of a number."""

LayoutOutcome = Literal["verified", "failed", "unverified", "skipped"]
"""Of the search for a layout. "unverified": nothing is there to compare with, so the layout of sm90 is used."""

PartOutcome = Literal["done", "raised", "skipped"]


@dataclass(frozen=True, slots=True)
class Gpu:
    """The GPU that was checked.

    Attributes:
        name: As torch has it.
        capability: Major and minor.
        memory_bytes: Of the device.
        processors: Streaming multiprocessors.
        power_limit_watts: As nvidia-smi says; None where it does not.
    """

    name: str
    capability: tuple[int, int]
    memory_bytes: int
    processors: int
    power_limit_watts: float | None = None

    @property
    def architecture(self) -> str:
        """Such as "sm90"."""
        return "sm" + "".join(map(str, self.capability))


@dataclass(frozen=True, slots=True)
class Part:
    """One part of the self-check.

    Attributes:
        name: Of the part.
        outcome: How it ended; a part that spent its budget is done, and what it left out says so.
        seconds: That it took.
        reason: Why it was skipped, or the error.
    """

    name: str
    outcome: PartOutcome
    seconds: float = 0.0
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Check:
    """One path compared with what it must compute.

    Attributes:
        name: Of the path.
        outcome: Whether it is right.
        error: The largest error, or how many values are wrong; None where nothing was compared.
        allowed: The largest that is right.
        where: Which result that is: y, dx, dW or db, or one of another kind.
        rule: What is allowed, in words.
        reason: Why the check was skipped, or the error that it ended in.
    """

    name: str
    outcome: Outcome
    error: float | None = None
    allowed: float | None = None
    where: str = ""
    rule: str = ""
    reason: str = ""

    @property
    def failed(self) -> bool:
        """Whether the path is wrong here."""
        return self.outcome in ("fail", "raised")


@dataclass(frozen=True, slots=True)
class Layout:
    """The packed format of one dtype.

    Attributes:
        dtype: Of the packed values.
        outcome: Whether it was found and compared byte for byte.
        packer: What packs matrices; "" where nothing does.
        bits: Of formats.layout.MetadataLayout; empty where no layout is known.
        reason: In words.
    """

    dtype: str
    outcome: LayoutOutcome
    packer: str
    bits: tuple[int, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class LayerTimes:
    """One linear layer, forward and backward.

    Attributes:
        problem: Its sizes.
        measurement: Times of each candidate, and why others have none.
    """

    problem: LinearProblem
    measurement: Measurement


@dataclass(frozen=True, slots=True)
class ModelTimes:
    """One model, forward and backward.

    Attributes:
        title: What it is.
        mode: "compiled" or "eager".
        why_eager: Why it was not compiled; "" if it was.
        ms: Milliseconds of each variant; dense is among them unless nothing was timed.
        dropped: Variant -> why it has no time.
    """

    title: str
    mode: Literal["compiled", "eager"]
    why_eager: str
    ms: dict[str, float]
    dropped: dict[str, str]


@dataclass
class Report:
    """All that a self-check found; the parts that ran fill it one after the other.

    Attributes:
        started: UTC, as 2026-11-26T12:00:00Z.
        quick: Whether nothing was to be timed.
        budget: Seconds for all parts together.
        device: "cuda" or "cpu".
        facts: Versions and the like, as `semisparse env` has them.
        capabilities: (name, path, reason), as there.
        gpu: The GPU; None without one.
        parts: Those that ran, or why they did not.
        checks: Of part "numerics".
        layouts: Of part "layouts".
        layers: Of part "layers".
        choices: What the autotuner chose for the layers, with the key of each problem.
        model: Of part "model".
    """

    started: str
    quick: bool
    budget: float
    device: str
    facts: dict[str, str]
    capabilities: list[tuple[str, str, str]]
    gpu: Gpu | None = None
    parts: list[Part] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    layouts: list[Layout] = field(default_factory=list)
    layers: list[LayerTimes] = field(default_factory=list)
    choices: list[tuple[dict[str, object], Choice]] = field(default_factory=list)
    model: ModelTimes | None = None

    @property
    def failed(self) -> bool:
        """Whether a path computes something wrong, or the numerics could not be checked at all."""
        raised = any(part.name == "numerics" and part.outcome == "raised" for part in self.parts)
        return raised or any(check.failed for check in self.checks)
